"""Downloads: with a stand-in for the network, and nothing half-written when it fails."""

from __future__ import annotations

import hashlib
import io
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from eyetune.backbones import BACKBONES, hub, load_backbone, timm_any
from eyetune.backbones.spec import BackboneSpec
from eyetune.errors import MissingExtra, WeightsError

CONTENT = b"\x80weights" * 300_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EYETUNE_CACHE", str(tmp_path))
    return tmp_path / "weights"


@pytest.fixture
def green() -> BackboneSpec:
    return BACKBONES.get("retfound-green")


class Answer(io.BytesIO):
    """What urlopen returns: `size` is what the server claims; `breaks_after` bytes the connection drops."""

    def __init__(self, content: bytes, *, size: int | None = None, kind: str = "application/octet-stream") -> None:
        super().__init__(content)
        self.headers = Message()
        self.headers["Content-Type"] = kind
        self.headers["Content-Length"] = str(len(content) if size is None else size)


def serve(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[str]:
    asked: list[str] = []

    def urlopen(address: str, timeout: float) -> Any:
        asked.append(address)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def test_a_download_is_kept_with_its_checksum(
    monkeypatch: pytest.MonkeyPatch, cache: Path, green: BackboneSpec
) -> None:
    asked = serve(monkeypatch, Answer(CONTENT))
    path = hub.download(green)
    assert path == cache / "retfound-green" / "retfoundgreen_statedict.pth"
    assert path.read_bytes() == CONTENT
    assert path.with_name(path.name + ".sha256").read_text().split()[0] == hashlib.sha256(CONTENT).hexdigest()
    assert asked == [green.download.url]
    assert hub.download(green) == path
    assert len(asked) == 1, "downloaded twice"


def test_a_file_that_changed_since_is_refused(monkeypatch: pytest.MonkeyPatch, green: BackboneSpec) -> None:
    serve(monkeypatch, Answer(CONTENT))
    path = hub.download(green)
    path.write_bytes(CONTENT + b"!")
    with pytest.raises(WeightsError, match=r"has changed since .* Delete it"):
        hub.download(green)


def test_a_file_that_is_not_the_published_one_is_refused(monkeypatch: pytest.MonkeyPatch, green: BackboneSpec) -> None:
    serve(monkeypatch, Answer(CONTENT))
    known = replace(green, download=replace(green.download, sha256="0" * 64))
    with pytest.raises(WeightsError, match="is not the published file"):
        hub.download(known)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(CONTENT[:1000], size=len(CONTENT)), r"ended after 1000 of \d+ bytes"),
        (Answer(b"<html>", kind="text/html; charset=utf-8"), "web page"),
        (urllib.error.URLError("Name or service not known"), "Check the connection"),
        (TimeoutError("timed out"), "Check the connection"),
        (KeyboardInterrupt(), None),
    ],
)
def test_a_failed_download_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, cache: Path, green: BackboneSpec, answer: Any, said: str | None
) -> None:
    serve(monkeypatch, answer)
    with pytest.raises(WeightsError if said else KeyboardInterrupt, match=said):
        hub.download(green)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_an_interrupted_download_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, cache: Path, green: BackboneSpec
) -> None:
    class Breaks(Answer):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 0:
                raise ConnectionResetError("connection reset by peer")
            return super().read(size)

    serve(monkeypatch, Breaks(CONTENT))
    with pytest.raises(WeightsError, match="connection reset"):
        hub.download(green)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


class FakeHub:
    """Stands in for hf_hub_download."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **asked: Any) -> str:
        self.calls.append(asked)
        if self.error is not None:
            raise self.error
        path = Path(asked["local_dir"]) / asked["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT)
        return str(path)


def http_error(kind: str) -> Exception:
    import huggingface_hub.errors as errors

    error: Exception = getattr(errors, kind).__new__(getattr(errors, kind))
    error.args = (kind,)
    return error


def test_hugging_face(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    fake = FakeHub()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake)
    path = hub.download(BACKBONES.get("retfound"))
    assert path.read_bytes() == CONTENT
    assert path.with_name(path.name + ".sha256").is_file()
    assert fake.calls[0]["repo_id"] == "YukunZhou/RETFound_mae_natureCFP"
    hub.download(BACKBONES.get("retfound"))
    assert len(fake.calls) == 1


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("GatedRepoError", r"accept its terms .*CC BY-NC.*https://huggingface.co/YukunZhou.*hf auth login.*by|browser"),
        ("RepositoryNotFoundError", "hf auth login"),
        ("LocalEntryNotFoundError", "Check the connection"),
        ("OfflineModeIsEnabled", "Check the connection"),
        ("EntryNotFoundError", "no longer holds RETFound_mae_natureCFP.pth"),
    ],
)
def test_hugging_face_says_no(monkeypatch: pytest.MonkeyPatch, cache: Path, kind: str, said: str) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", FakeHub(http_error(kind)))
    with pytest.raises(WeightsError, match=said):
        load_backbone("retfound", "hub")
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"eyetune\[hub\]"):
        load_backbone("retfound", "hub")


def test_what_no_program_can_download_is_explained() -> None:
    with pytest.raises(WeightsError, match=r"cannot be downloaded by a program.*ABILab-CUHK"):
        load_backbone("visionfm", "hub")


def test_timm_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise http_error("LocalEntryNotFoundError")
        return create(name, **options)

    monkeypatch.setattr(timm_any, "check_connection", lambda name: None)
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsError, match=r"resnet18.*Check the connection"):
        load_backbone("resnet18", "hub")


def test_timm_is_not_asked_where_no_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm would try twelve times, for most of a minute; what this machine has is used without asking."""
    import huggingface_hub

    asked: list[str] = []

    def unreachable(request: Any, timeout: float) -> Any:
        asked.append(request.full_url)
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(timm_any, "build", lambda *args, **options: pytest.fail("timm was asked"))
    with pytest.raises(WeightsError, match=r"resnet18 \(.*not known.*\)\. Check the connection"):
        load_backbone("resnet18", "hub")
    assert len(asked) == 1
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, file: f"/cache/{file}")
    timm_any.check_connection("resnet18")
    assert len(asked) == 1


def test_timm_weights_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm_any, "check_connection", lambda name: None)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    backbone = load_backbone("resnet18", "hub")
    assert backbone.report is not None
    assert backbone.report.whole
    assert backbone.report.matched == len(backbone.network.state_dict())


def test_nothing_is_fetched_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a network call")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_backbone("resnet18", "random")
    load_backbone("nano", "random", pixels=64)
    with pytest.raises(WeightsError):
        load_backbone("green")
