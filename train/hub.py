"""A finished LoRA to the hub: its file, its card and the videos that the card shows, in one commit.

The token is `--hub_token`, else `HF_TOKEN`, else the login of the hub's library. It goes into the requests and nowhere
else: no record, no log, no message.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from shared.console import say, warn
from shared.errors import ConfigError, HubError, UserError
from shared.lora import FILE_NAME
from train.card import NAME, gallery, write_card

if TYPE_CHECKING:
    from train.config import TrainConfig


def find_token(given: str | None) -> str:
    """The token to push with.

    Raises:
        ConfigError: there is none.
    """
    from huggingface_hub import get_token

    token = given or get_token()
    if not token:
        raise ConfigError("there is no token to push with; set HF_TOKEN or run `hf auth login`")
    if not re.fullmatch(
        r"[!-~]+", token
    ):  # an HTTP header cannot hold it, and is told, in other letters, when it fails
        raise ConfigError("the token to push with holds a space or a letter that is none of a token's; copy it again")
    return token


def repository(hub_model_id: str | None, output_dir: Path) -> str:
    """The repository to push to: the one that was asked for, else one that is named like the folder, the owner's own.

    Raises:
        ConfigError: the hub does not take such a name.
    """
    asked = hub_model_id or output_dir.resolve().name
    parts = asked.split("/")
    if len(parts) > 2 or not all(re.fullmatch(r"\w(?:[\w.-]{0,94}\w)?", part, re.ASCII) for part in parts):
        raise ConfigError(
            f"--hub_model_id {asked}: must be owner/name or name, of letters, digits, '.', '_' and '-' (default: the "
            "output folder's name)"
        )
    return asked


def check_push(config: TrainConfig) -> None:
    """Before anything is loaded: whether the end of a run can push.

    Raises:
        ConfigError: there is no token, or the repository's name is none.
    """
    if config.push_to_hub:
        find_token(config.hub_token)
        repository(config.hub_model_id, Path(config.output_dir))


def push_run(folder: Path, hub_model_id: str | None, token: str, license: str, *, new_card: bool) -> str:
    """Push a run's LoRA. Returns the repository's address.

    Args:
        new_card: write the card anew; else one that is there is taken as it is.

    Raises:
        HubError: the hub does not answer, or refuses.
    """
    asked = repository(hub_model_id, folder)
    owner_and_name = asked if "/" in asked else f"{_owner(token)}/{asked}"
    if new_card or not (folder / NAME).exists():
        write_card(folder, owner_and_name, license)
    names = [FILE_NAME, NAME, *(str(video.path.relative_to(folder)) for video in gallery(folder))]
    return _upload(folder, names, owner_and_name, token)


def _owner(token: str) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi(token=token).whoami()["name"])
    except Exception as error:  # see _upload
        raise _hub_error("who the token belongs to", error, token) from None


def _upload(folder: Path, names: list[str], repo_id: str, token: str) -> str:
    """Upload files in one commit: all of them are there, or none."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi(token=token)
    files = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
    try:
        address = api.create_repo(repo_id, exist_ok=True)
        api.create_commit(repo_id, files, commit_message="Upload a LoRA trained with LatentReel")
    except Exception as error:  # a network, a server and three libraries of transfer: the files are here whatever it is
        raise _hub_error(repo_id, error, token) from None
    return str(address)


def _hub_error(what: str, error: Exception, token: str) -> HubError:
    """What the hub's library said, without the token: a header that is not one is told with its value."""
    said = " ".join(f"{type(error).__name__}: {error}".split()).replace(token, "***")
    return HubError(f"{what}: the hub refused or did not answer ({said}); nothing is lost: try again later")


def push_result(config: TrainConfig, output_dir: Path) -> None:
    """At a run's end: push what was trained, if that was asked for. Where it fails, say how to try again."""
    if not config.push_to_hub:
        return
    try:
        token = find_token(config.hub_token)
        address = push_run(output_dir, config.hub_model_id, token, config.hub_license, new_card=True)
    except (UserError, OSError) as error:  # the hub, or a card that cannot be written: the LoRA is there either way
        command = ["python", "-m", "train.push", str(output_dir)]
        command += ["--hub_model_id", config.hub_model_id] if config.hub_model_id else []
        command += ["--hub_license", config.hub_license] if config.hub_license != "other" else []
        warn(str(error))
        warn(f"the LoRA is in {output_dir}; push it with: {shlex.join(command)}")
        return
    say("hub", address)
