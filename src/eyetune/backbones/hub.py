"""`weights: hub`: the published file, fetched once, its checksum beside it. Only this module uses a network."""

from __future__ import annotations

import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from eyetune import files
from eyetune.backbones.spec import BackboneSpec, Download
from eyetune.errors import MissingExtra, WeightsError
from eyetune.progress import meter

_CHUNK = 1 << 20
_TIMEOUT = 30.0  # seconds without an answer


def download(spec: BackboneSpec) -> Path:
    """The published file of `spec`, downloaded unless it is there already; its SHA-256 is recorded in `FILE.sha256`.

    Raises:
        WeightsError: nothing to download; no connection; the terms of a gated repository are not accepted; the file
            arrived damaged, or has changed since it was downloaded.
        MissingExtra: the file lies on Hugging Face and huggingface_hub is not installed.
    """
    source = spec.download
    if source is None:
        raise WeightsError(
            f"model.weights: {spec.name} cannot be downloaded by a program. Get it from {spec.source} "
            f"(licence: {spec.licence}) and set model.weights to the file."
        )
    path = files.cache_folder() / "weights" / spec.name / source.filename
    record = path.with_name(path.name + ".sha256")
    if path.is_file() and record.is_file():
        _verify(path, record.read_text(encoding="utf-8").split()[0], "has changed since it was downloaded")
        return path
    if source.repo is not None:
        _from_hugging_face(spec, source, path)
    else:
        _from_address(source, path)
    digest = files.sha256(path)
    if source.sha256 is not None:
        _verify(path, source.sha256, "is not the published file")
    files.write_text(record, f"{digest}  {path.name}\n")
    return path


def _verify(path: Path, expected: str, what: str) -> None:
    found = files.sha256(path)
    if found != expected:
        raise WeightsError(
            f"{path} {what}: its SHA-256 is {found}, not {expected}. Delete it and run again to download it afresh."
        )


def _from_hugging_face(spec: BackboneSpec, source: Download, path: Path) -> None:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError
        from huggingface_hub.errors import RepositoryNotFoundError as NotFound
    except ImportError as error:
        raise MissingExtra(f"downloading {spec.name} (model.weights: hub)", "hub") from error
    by_hand = f"Or download {source.filename} there in a browser and set model.weights to the file."
    try:
        # A local folder rather than the shared cache: the file keeps its name, and the checksum lies beside it.
        hf_hub_download(repo_id=str(source.repo), filename=source.filename, local_dir=path.parent)
    except LocalEntryNotFoundError as error:
        raise WeightsError(_offline(source.page, error)) from error
    except (GatedRepoError, NotFound) as error:
        # A gated repository says "not found" to those who are not logged in.
        raise WeightsError(
            f"{spec.title} is given only to those who accept its terms (licence: {spec.licence}). Open {source.page}, "
            f"accept them, then type `hf auth login` and run this again. {by_hand}"
        ) from error
    except EntryNotFoundError as error:
        raise WeightsError(f"{source.page} no longer holds {source.filename}. {by_hand}") from error
    except Exception as error:  # whatever else its network libraries raise
        raise WeightsError(_offline(source.page, error)) from error


def _from_address(source: Download, path: Path) -> None:
    address = str(source.url)
    if not address.startswith("https://"):
        raise ValueError(f"not a secure address: {address}")
    with files.atomic(path) as temporary:
        try:
            _fetch(address, temporary)
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            raise WeightsError(_offline(address, error)) from error


def _fetch(address: str, target: Path) -> None:
    """Write what lies at `address` to `target`. Raises WeightsError when it is a page, or ends early."""
    with urllib.request.urlopen(address, timeout=_TIMEOUT) as answer, open(target, "wb") as stream:  # noqa: S310
        if "text/html" in (answer.headers.get("Content-Type") or ""):
            raise WeightsError(f"{address} led to a web page, not to the weights. Download the file in a browser.")
        size = answer.headers.get("Content-Length")
        total, done = (int(size) if size else None), 0
        with meter(total and total // _CHUNK, f"Downloading {target.suffix.lstrip('.') or 'weights'}", "MiB") as update:
            while chunk := answer.read(_CHUNK):
                stream.write(chunk)
                done += len(chunk)
                update(done // _CHUNK)
    if total is not None and done != total:
        raise WeightsError(f"{address}: the connection ended after {done} of {total} bytes. Run again.")


def _offline(address: str, error: BaseException) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"cannot download from {address} ({reason[:200]}). Check the connection, or download the file on another "
        "machine and set model.weights to it."
    )
