"""Stores on the Hugging Face Hub, as datasets.

A push writes as a dump does: what a store is called first, its root last; so an interrupted one is
never taken for a store, and running it again goes on. A pull does the same, then checks every byte.
Uploads and downloads are huggingface_hub's: its token (``hf auth login`` or ``HF_TOKEN``), endpoint
(``HF_ENDPOINT``), progress and retries.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import journal
from .errors import ActstoreError, CorruptStoreError, StoreError, UsageError, WriteError
from .places import is_url, is_zip
from .root import read_manifest
from .storage import LocalStorage
from .store import Store, open_store
from .verifying import verify

__all__ = ["pull", "push"]

_ROOT = "zarr.json"
_DATASET: dict[str, Any] = {"repo_type": "dataset"}


def push(
    store: Store | str | os.PathLike[str],
    name: str,
    *,
    private: bool = True,
    message: str | None = None,
) -> str:
    """Put a store on the Hub, as a dataset.

    Parameters
    ----------
    store : Store or path
        Sealed, in a folder. A README.md there (`actstore card`) becomes the dataset's page.
    name : str
        ``user/name``; made if it is not there.
    private : bool
        Whether only you see it, if it is made: a store holds the texts, too.
    message : str, optional
        Of the commits.

    Returns
    -------
    str
        The dataset's address.

    Raises
    ------
    UsageError
        A name that cannot be, a store that is in no folder, or another store under that name.
    WriteError
        The Hub cannot be reached, or refuses. Pushing again goes on.

    Examples
    --------
    >>> push("run.zarr", "no name")
    Traceback (most recent call last):
        ...
    actstore.errors.UsageError: 'no name' is not a dataset's name: write 'user/name'
    """
    hub = _hub()
    _check_name(hub, name)
    path = store.path if isinstance(store, Store) else os.fspath(store)
    if is_url(path) or is_zip(path):
        raise UsageError(f"{path} is in no folder: copy or unzip it to one, and push that")
    store = open_store(path)
    api, message = hub.HfApi(), message or f"actstore {store.id}"
    ours: dict[str, Any] = {"repo_id": name, "folder_path": store.path, **_DATASET}
    with _told(hub, f"pushing to {name}", WriteError):
        address = api.create_repo(name, private=private, exist_ok=True, **_DATASET)
        there = _manifest_there(hub, name, None)
        if there is not None and there != store.id:
            raise UsageError(
                f"{name} holds another store, {there}: choose another name, or delete it there"
            )
        for choice in (
            {"allow_patterns": [journal.MANIFEST]},
            {"ignore_patterns": [journal.MANIFEST, _ROOT]},
            {"allow_patterns": [_ROOT]},
        ):
            api.upload_folder(**ours, **choice, commit_message=message)
    return str(address)


def pull(
    name: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Store:
    """Get a store from the Hub, and check every byte of it.

    Parameters
    ----------
    name : str
        ``user/name`` of a dataset.
    folder : path, optional
        Where it goes: a new or empty folder, or one that an earlier pull began. Default
        ``NAME.zarr`` here.
    revision : str, optional
        A branch, tag or commit.
    progress : callable, optional
        Called with the key of every object that is checked.

    Returns
    -------
    Store

    Raises
    ------
    UsageError
        A name that cannot be, or a folder that has something else in it.
    StoreError
        There is no such dataset, or no whole store in it; the Hub cannot be reached.
    CorruptStoreError
        What came is damaged; that is deleted, so that pulling again gets it anew.

    Examples
    --------
    >>> pull("no name")
    Traceback (most recent call last):
        ...
    actstore.errors.UsageError: 'no name' is not a dataset's name: write 'user/name'
    """
    hub = _hub()
    _check_name(hub, name)
    place = Path(
        folder if folder is not None else f"{name.split('/')[1].removesuffix('.zarr')}.zarr"
    )
    with _told(hub, f"pulling {name}", StoreError):
        facts = hub.HfApi().repo_info(name, revision=revision, **_DATASET)
        files = {file.rfilename for file in facts.siblings or ()}
        there = _manifest_there(hub, name, facts.sha)
        if _ROOT not in files or there is None:
            part = "only part of a store: push it again" if there else "no store of actstore's"
            raise StoreError(f"{name} holds {part}")
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            _check_same(place, there)
        own: dict[str, Any] = {"revision": facts.sha, "local_dir": str(place), **_DATASET}
        hub.snapshot_download(name, ignore_patterns=[_ROOT, ".gitattributes"], **own)
        hub.snapshot_download(name, allow_patterns=[_ROOT], **own)
    _check_all(place, name, progress)
    shutil.rmtree(place / ".cache", ignore_errors=True)  # huggingface_hub's, to go on by
    return open_store(place)


def _check_all(place: Path, name: str, progress: Callable[[str], None] | None) -> None:
    """Verify what came; what is damaged goes, and the root, so that it is no store."""
    bad = []
    try:
        for key, problem in verify(place):
            if progress is not None:
                progress(key)
            if problem is not None:
                bad.append(problem)
    except CorruptStoreError:
        (place / _ROOT).unlink(missing_ok=True)
        raise
    if bad:
        for key in (_ROOT, *(problem.key for problem in bad)):
            (place / key).unlink(missing_ok=True)
        raise CorruptStoreError(
            f"{len(bad)} objects of {name} are damaged, such as {bad[0]}. They are deleted from "
            f"{place}: pull again, and if that is no better, ask whoever pushed it to push anew"
        )


def _check_same(place: Path, there: str) -> None:
    """Refuse a folder with anything but an earlier pull of the same store."""
    try:
        here = read_manifest(LocalStorage(place))["id"]
    except ActstoreError:
        here = None
    begun = here is None and set(os.listdir(place)) <= {".cache", "journal"}
    if here != there and not begun:
        what = "something else in it" if here is None else f"another store in it, {here}"
        raise UsageError(f"{place} has {what}: name a new folder")


def _manifest_there(hub: Any, name: str, revision: str | None) -> str | None:
    """The id of the store that a dataset holds, or is to hold; None where there is none."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            hub.hf_hub_download(
                name, journal.MANIFEST, revision=revision, local_dir=scratch, **_DATASET
            )
        except hub.errors.RemoteEntryNotFoundError:
            return None
        return str(read_manifest(LocalStorage(scratch))["id"])


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise UsageError("the Hub needs huggingface_hub: pip install 'actstore[hub]'") from None
    return huggingface_hub


def _check_name(hub: Any, name: str) -> None:
    try:
        hub.utils.validate_repo_id(name)
        whole = name.count("/") == 1
    except hub.errors.HFValidationError:
        whole = False
    if not whole:
        raise UsageError(f"{name!r} is not a dataset's name: write 'user/name'")


@contextmanager
def _told(hub: Any, what: str, kind: type[ActstoreError]) -> Iterator[None]:
    """Turn what huggingface_hub raises into errors of ours."""
    try:
        yield
    except ActstoreError:
        raise
    except hub.errors.RepositoryNotFoundError:
        raise kind(
            f"{what} failed: there is no such dataset, or you may not see it; `hf auth login` or "
            "HF_TOKEN says who you are"
        ) from None
    except hub.errors.RevisionNotFoundError:
        raise kind(f"{what} failed: there is no such revision") from None
    except Exception as error:
        # Failing requests are of the HTTP library, which is not the same in every version.
        known = isinstance(error, (OSError, RuntimeError)) or "http" in type(error).__module__
        if not known:
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise kind(
            f"{what} failed: {lines[0] if lines else type(error).__name__}. Look at the network "
            "and HF_ENDPOINT, and run it again: it goes on"
        ) from error
