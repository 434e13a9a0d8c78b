"""The commands that can run on several ranks: their modules, settings and output folders."""

from __future__ import annotations

from pathlib import Path

from pretrain.config import load_config, settings_to_resume_from
from pretrain.ds_config import derive_ds_config

# The module that each rank runs, by verb (the name of the command).
MODULES = {
    "prepare": "data_prep",
    "pretrain": "pretrain",
    "finetune": "eval.finetune",
    "perturb": "eval.perturb",
}


def module_of(verb: str) -> str:
    """Return the module that each rank runs for a verb.

    Raises
    ------
    ValueError
        The verb runs on one rank only.
    """
    if verb not in MODULES:
        raise ValueError(f"launch: '{verb}' does not run on several ranks; {sorted(MODULES)} do")
    return MODULES[verb]


def check_and_find_folder(verb: str, arguments: list[str]) -> Path:
    """Return the absolute path of the folder that a verb will write, after checking its settings.

    Wrong settings raise a ValueError here, once, before every rank would raise it.
    """
    module_of(verb)
    if verb != "pretrain":
        out = _option(arguments, "--out")
        if out is None:
            raise ValueError(f"launch {verb}: --out is missing")
        return Path(out).absolute()
    config = _option(arguments, "--config")
    if config is None:
        raise ValueError("launch pretrain: --config is missing")
    overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
    resume_from = _option(arguments, "--resume-from")
    settings = load_config(config, [*overrides, *settings_to_resume_from(resume_from)])
    derive_ds_config(settings)
    return settings.run.out.absolute()


def to_go_on(verb: str, arguments: list[str]) -> list[str]:
    """Return the arguments with which the next attempt continues a run."""
    if verb != "pretrain":
        return arguments  # these commands read what is finished, and go on
    # A step that the user chose for the first attempt is dropped, because newer checkpoints may
    # exist.
    kept = _without_option(arguments, "--step")
    return [*(a for a in kept if a not in ("--resume", "--restart")), "--restart"]


def saved_step(out: Path) -> int:
    """Return the step of a pretraining's newest checkpoint, -1 if there is none."""
    try:
        return int((out / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    except (OSError, ValueError):
        return -1


def named_values(option: str, given: list[str]) -> dict[str, str]:
    """Return the values by name of an option that is given as NAME=VALUE.

    Anything else raises a ValueError.
    """
    values = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ValueError(f"{option} {text}: must be NAME=VALUE")
        values[name] = value
    return values


def _without_option(arguments: list[str], name: str) -> list[str]:
    """Return the arguments without an option and its value."""
    kept, is_value = [], False
    for word in arguments:
        if not is_value and word != name and not word.startswith(f"{name}="):
            kept.append(word)
        is_value = word == name
    return kept


def _option(arguments: list[str], name: str) -> str | None:
    for place, word in enumerate(arguments):
        if word == name and place + 1 < len(arguments):
            return arguments[place + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None
