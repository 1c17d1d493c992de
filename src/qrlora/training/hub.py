"""Uploading a finished run to the hub, with the login that the machine has; tokens are never configuration."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from qrlora.errors import QrloraError
from qrlora.training.card import CARD
from qrlora.training.config import TrainConfig
from qrlora.training.folder import RESULT


def find_repository(config: TrainConfig) -> str | None:
    """Where the result goes, as `OWNER/NAME`; None without `push_to_hub`. Asks the hub who is logged in.

    Raises:
        QrloraError: an impossible name, nobody logged in, no network, or a login that may not write there.
    """
    if not config.push_to_hub:
        return None
    name = config.hub_model_id or Path(config.output_dir).resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise QrloraError(
            f"hub_model_id={name} is no name of a repository; write OWNER/NAME in letters, digits, -, _ and dots."
        ) from error
    try:
        login = HfApi().whoami()
    except Exception as error:  # the client and what it stands on raise their own kinds
        raise QrloraError(
            f"push_to_hub: the hub does not say who you are ({_words(error)}); log in with hf auth login or set "
            "HF_TOKEN, or drop push_to_hub and upload the result later."
        ) from error
    owner, _, rest = name.rpartition("/")
    owners = {login["name"], *(group["name"] for group in login.get("orgs") or ())}
    if owner and owner not in owners:
        raise QrloraError(
            f"hub_model_id={name}: you are logged in as {login['name']}, who is not {owner} and not of that "
            f"organisation; write {login['name']}/{rest}, or log in as another."
        )
    if ((login.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise QrloraError(
            "push_to_hub: you are logged in with a token that may only read; log in with one that may write."
        )
    return name if owner else f"{login['name']}/{name}"


def push(repository: str, config: TrainConfig, pictures: Sequence[str]) -> str:
    """Upload adapter, card and pictures of a finished run, making the repository where there is none.

    The configuration stays here: it names folders of this machine.

    Args:
        repository: from `find_repository`.
        config: of the run.
        pictures: paths relative to `output_dir`.

    Returns:
        The repository's address.

    Raises:
        QrloraError: it did not arrive; the sentence says how to upload later.
    """
    output, files = Path(config.output_dir), [RESULT, CARD, *pictures]
    api = HfApi()
    try:
        made = api.create_repo(repository, private=config.hub_private_repo, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=output,
            allow_patterns=files,
            commit_message=f"An adapter of {config.max_train_steps} steps",
        )
    except Exception as error:  # likewise
        included = " ".join(f"--include {shlex.quote(file)}" for file in files)
        raise QrloraError(
            f"{output / RESULT} is finished, but was not pushed to the hub ({_words(error)}); later: hf upload "
            f"{repository} {shlex.quote(str(output))} . {included}, or the same run with resume: latest."
        ) from error
    return str(made)


def _words(error: Exception) -> str:
    """The first line of what a library says, without its colours."""
    lines = str(error).partition("\x1b")[0].strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
