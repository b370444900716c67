"""Models of the hub, or of a folder: where their files are on this machine."""

from __future__ import annotations

from pathlib import Path

from shared.errors import ModelError


def fetch_files(
    name: str, *, revision: str | None, cache_dir: str | None, patterns: list[str], example: str
) -> tuple[str, str | None, Path]:
    """The files of a model, fetched from the hub when `name` is not a folder.

    Args:
        patterns: of the files that are fetched; of a folder, all are there.
        example: of a hub id, for the message.

    Returns:
        Its name (the hub id, or the folder's absolute path), the hub's commit (None for a folder), and its folder.

    Raises:
        ModelError: neither a folder nor a hub id that can be fetched.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder.resolve()), None, folder.resolve()
    if not is_hub_id(name):
        raise ModelError(f"{name}: no such folder, and not a hub id such as {example}")
    from huggingface_hub import snapshot_download  # late: a folder needs no hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        fetched = Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ModelError(f"{name}: no such folder, and the hub did not give it: {error}") from error
    return name, fetched.name, fetched


def is_hub_id(name: str) -> bool:
    """Whether what is no folder here can be a repository of the hub."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))
