"""A small model, its reader, the server of its page in a thread, and a client that knows nothing of browsers."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np
from data_kit import fundus, save
from train_kit import PREPROCESS, card, tiny_backbone

from eyetune.adapt import parse_adapt
from eyetune.adapt.classifier import Classifier
from eyetune.data.fundus import FundusSettings
from eyetune.data.record import Record
from eyetune.data.records import Manifest
from eyetune.metrics.calibration import fit_calibration
from eyetune.metrics.strangeness import Strangeness
from eyetune.runtime import Runtime
from eyetune.serving.app import make_app
from eyetune.serving.limits import Limits
from eyetune.serving.reader import Reader
from eyetune.serving.server import listen, make_server
from eyetune.train.run import Run
from eyetune.train.rundir import RunDir

GRADES = ("0", "1", "2", "3", "4")


def eye(seed: int, suffix: str = ".png", **changes: Any) -> bytes:
    """The file of a drawn eye."""
    drawn = fundus(200, 260, radius=90, seed=seed, **changes)
    return bytes(cv2.imencode(suffix, cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))[1].tobytes())


def tiny_run(folder: Path) -> Run:
    """An untrained network of five grades, with everything that is fitted on validation."""
    model = Classifier(tiny_backbone(), len(GRADES), 0.0)
    strategy = parse_adapt("full").build()
    model = strategy.apply(model)
    strategy.set_mode(model, training=False)
    settings = FundusSettings(pixels=32, fit="pad")
    known = card(backbone="nano", classes=GRADES, fundus=settings.to_dict(), preprocess=PREPROCESS.to_dict())
    run = Run(RunDir.create(folder / "tiny"), model, strategy, known, Runtime("cpu", "fp32", seed=0))
    records = []
    for number in range(20):
        photo = fundus(60, 80, radius=28, brightness=0.6 + 0.04 * number, seed=number)
        path = save(folder / "val" / f"{number}.png", photo)
        records.append(Record(path, number % 5, path.name, path.name))
    manifest = Manifest(tuple(records), GRADES, "val")
    fitted = fit_calibration(run.predictions(manifest, workers=0), "val", resamples=10)
    rule = Strangeness(score="mahalanobis", threshold=1.5, chosen_on="val", fitted_on=20, tensors="")
    run.__dict__["calibration"] = fitted and fitted.model_copy(update={"ood": rule})
    run.__dict__["novelty"] = None
    run.fit_novelty(manifest, workers=0)
    return run


def reader_of(run: Run, **changes: Any) -> Reader:
    return Reader(run, **{"calibration": run.calibration, "most_pixels": 4_000_000, **changes})


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()


@dataclass
class Client:
    """One that asks as the page does."""

    port: int
    token: str = ""
    _places: list[int] = field(default_factory=list, repr=False)

    def ask(self, method: str, path: str, body: Any = None, *, timeout: float = 20, **headers: str | None) -> Answer:
        """One request on a connection of its own; `X_Y="v"` is the header X-Y, None leaves one out."""
        sent: dict[str, str | None] = {"X-EyeTune-Page": self.token or None}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, {name: value for name, value in sent.items() if value is not None})
            found = connection.getresponse()
            return Answer(found.status, {name.lower(): value for name, value in found.getheaders()}, found.read())
        finally:
            connection.close()

    def open(self) -> Client:
        """A page of its own."""
        return Client(self.port, self.ask("POST", "/api/page").json["page"])

    def send(self, name: str, data: Any, **headers: str | None) -> Answer:
        self._places.append(len(self._places))
        known = {"Content_Type": "application/octet-stream", "X_EyeTune_Name": quote(name)}
        known["X_EyeTune_Place"] = str(len(self._places))
        return self.ask("POST", "/api/photographs", data, **known | headers)

    def cards(self, point: str | None = None) -> list[dict[str, Any]]:
        """What the page says of each photograph, once all have been read, in order."""
        asked = "" if point is None else f"&point={quote(point)}"
        for _ in range(400):
            told = self.ask("GET", f"/api/photographs?since=0{asked}").json
            if all(one["state"] in ("done", "failed") for one in told["photographs"]):
                return sorted(told["photographs"], key=lambda one: one["place"])
            time.sleep(0.02)
        raise AssertionError("not read in time")

    def rows(self, point: str | None = None) -> list[str]:
        asked = "" if point is None else f"?point={quote(point)}"
        return self.ask("GET", f"/api/table.csv{asked}").text.splitlines()


@contextlib.contextmanager
def served(reader: Reader, limits: Limits | None = None, **options: Any) -> Iterator[Client]:
    """The server of a reader's page, on a free port."""
    limits = limits or Limits()
    with listen("127.0.0.1", 0) as socket:
        server = make_server(make_app(reader, limits), limits, **options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.005)
            yield Client(socket.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive()


def noise(seed: int, side: int) -> np.ndarray[Any, Any]:
    """uint8[side, side, 3] that no compression makes small."""
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
