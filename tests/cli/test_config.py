"""`longvideo config keys` explains every key of every command, and the help of a command names those most used."""

from __future__ import annotations

import pytest

from longvideo.cli.config import SCHEMAS
from longvideo.cli.main import main
from longvideo.config.keys import keys_of
from longvideo.config.loading import find_config, load_config, packaged_configs
from longvideo.errors import ConfigError


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_key_of_a_command_is_explained(command: str) -> None:
    assert [key.name for key in keys_of(SCHEMAS[command]()) if not key.text] == []


@pytest.mark.parametrize("command", SCHEMAS)
def test_the_help_of_a_command_names_its_presets_and_keys_that_exist(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "--help"]) == 0
    words = capsys.readouterr().out.split()
    schema = SCHEMAS[command]()
    own = {name for name in packaged_configs() if _configures(name, schema)}
    named = {word.strip(",.") for word in words if word.strip(",.") in packaged_configs()}
    assert own <= named
    keys = {key.name for key in keys_of(schema)}
    start, end = words.index("used:"), words.index("explains")
    listed = [word.strip(",.") for word in words[start + 1 : end] if word.endswith((",", "."))]
    assert len(listed) >= 5 and {key.replace("[0]", "[]") for key in listed} <= keys


def _configures(name: str, schema: type) -> bool:
    try:
        load_config(schema, [find_config(name)])
    except ConfigError:
        return False
    return True


def test_the_command_shows_the_values_of_a_preset_below_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "keys", "wan/dmd", "backbone"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "backbone.precision=nvfp4  (bf16 | nvfp4 | nvfp4-weights)"
    assert lines[1].startswith("    number format of the weights")
    assert lines[2] == "backbone.kv_cache=nvfp4  (bf16 | nvfp4 | nvfp4-mixed)" and len(lines) == 4
    assert main(["config", "keys"]) == 0
    assert (
        "commands: train vae, train ar, train clips, train decoder, distill\npresets: cpu/ar,"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "optimzer"], "'optimzer' is not a key; expected one of method, seed, model,"),
        (["tiny/dmb"], "did you mean 'tiny/dmd'?"),
        (["distill", "lora", "dmd"], "'dmd' is one word too many"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "keys", *arguments]) == 2
    assert message in capsys.readouterr().err
