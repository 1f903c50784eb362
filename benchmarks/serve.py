"""Does the page of `eyetune serve` hold out when many send at once? Uploads of 10 MB, all at the same time, to the
command as people start it; every answer is looked at, and the server's memory.

    python benchmarks/serve.py RUN [--uploads 50] [--megabytes 10] [--max-memory 256,64]
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from common import machine, markdown

MIB = 1 << 20


def photograph(size: int) -> bytes:
    """A JPEG of about `size` bytes, as a camera of 20 million pixels would write it: a lit disc with noise."""
    rng = np.random.default_rng(0)
    height, width = 3600, 5400
    ys, xs = np.ogrid[:height, :width]
    lit = np.hypot(ys - height / 2, xs - width / 2) < 1700
    picture = np.where(lit[..., None], np.add((60, 90, 190), rng.normal(0, 12, (height, width, 3))), 0)
    pixels = picture.clip(0, 255).astype(np.uint8)
    low, high = 1, 100
    while high - low > 1:
        middle = (low + high) // 2
        encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, middle])[1].tobytes()
        low, high = (middle, high) if len(encoded) <= size else (low, middle)
    encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, low])[1].tobytes()
    return bytes(encoded + bytes(size - len(encoded)))


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read()


def peak(process: int) -> float:
    """Most memory of a process so far, in MiB."""
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def busy(process: int) -> float:
    """Seconds that all threads of a process have computed so far."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(run: str, data: bytes, uploads: int, most: int) -> list[Any]:
    """A row of the table."""
    words = [sys.executable, "-m", "eyetune", "serve", run, "--port", "0", "--max-memory", str(most)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        try:
            port = int(server.stdout.readline().rstrip("/\n").rpartition(":")[2])
            known = {"X_EyeTune_Page": json.loads(ask(port, "POST", "/api/page")[1])["page"]}
            upload = known | {"Content_Type": "image/jpeg"}

            def settled(count: int) -> list[str]:
                while True:
                    found = json.loads(ask(port, "GET", "/api/photographs?since=0", **known)[1])["photographs"]
                    states = [one["state"] for one in found]
                    if len(states) >= count and not {"waiting", "reading"} & set(states):
                        return states
                    time.sleep(0.1)

            ask(port, "POST", "/api/photographs", data, **upload, X_EyeTune_Name="first.jpg")
            settled(1)
            alone, before, start = peak(server.pid), busy(server.pid), time.perf_counter()
            answers: list[int] = []

            def send(number: int) -> None:
                answers.append(ask(port, "POST", "/api/photographs", data, **upload, X_EyeTune_Name=f"{number}.jpg")[0])

            threads = [threading.Thread(target=send, args=(number,)) for number in range(uploads)]
            for one in threads:
                one.start()
            for one in threads:
                one.join()
            taken = time.perf_counter() - start
            states = settled(uploads + 1)
            whole = time.perf_counter() - start
            errors = sum(status != 201 for status in answers) + sum(state != "done" for state in states)
            spent = (busy(server.pid) - before) / uploads
            return [
                most,
                errors,
                f"{taken:.1f}",
                f"{whole:.1f}",
                f"{spent:.2f}",
                f"{alone:.0f}",
                f"{peak(server.pid):.0f}",
            ]
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--uploads", type=int, default=50)
    parser.add_argument("--megabytes", type=int, default=10)
    parser.add_argument("--max-memory", default="256,64")
    words = parser.parse_args()
    data = photograph(words.megabytes * 1_000_000)
    print(machine())
    print(f"{words.uploads} uploads of {len(data) / 1e6:.1f} MB at once")
    rows = [measure(words.run, data, words.uploads, int(most)) for most in words.max_memory.split(",")]
    header = ["--max-memory, MiB", "errors", "taken in, s", "all read, s", "processor s each"]
    print(markdown([*header, "peak MiB after one", "peak MiB after all"], rows))


if __name__ == "__main__":
    main()
