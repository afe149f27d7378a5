"""Figures of masks: what each kind masks of frequent and rare tokens, and of words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.mask_figures import figures, main


def test_kinds_mask_what_they_are_for(resolved: Callable[..., Any]) -> None:
    run = resolved(phase={"masking": {"term_sources": ["notes"]}})
    token, whole_word, token_aware = figures(run.last_phase)
    assert token.cut > 0.3
    # At most one word of a row is cut, and a row of these has a dozen of several tokens.
    assert whole_word.cut < 0.1
    # 0.3 to the power of the tokens of a word, which are two or three.
    assert token.whole < 0.09 < 0.2 < whole_word.whole
    for plain in (token, whole_word):
        assert [*plain.bands, plain.terms] == pytest.approx([0.3] * 4, abs=0.06)
    assert token_aware.bands == sorted(token_aware.bands)
    assert token_aware.terms > token.terms
    assert token_aware.seconds > 0


def test_the_command_prints_a_table(
    launcher: Any, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = launcher.write("run", data_folder)
    assert main(["--config", str(config), "phases.main.masking.term_sources=[papers]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| token",
        "| whole_word",
        "| token_aware",
    ]
    assert len({line.count("|") for line in lines}) == 1
    assert main(["--config", str(config)]) == 2
    assert "masking.term_sources" in capsys.readouterr().err
