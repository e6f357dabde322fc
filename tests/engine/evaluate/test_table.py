"""Tables and the JSON file."""

import io
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from pairtile.engine.errors import PairtileError
from pairtile.engine.evaluate import SplitResult, print_results, read_json, to_markdown, write_json
from pairtile.engine.evaluate.table import retrieval_rows


@pytest.fixture
def result(fake: ModuleType) -> SplitResult:
    return fake.evaluate_fake(fake.FakeModel(), 43)


def test_json_round_trip(result: SplitResult, tmp_path: Path) -> None:
    result.diagnostics.alignment = math.nan
    other = result.model_copy(update={"split": "other"})
    path = tmp_path / "new" / "results.json"
    write_json(path, [result, other], run="runs/demo", step=100)
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert list(content) == ["format", "version", "about", "splits"]
    assert content["about"] == {"run": "runs/demo", "step": 100}
    assert content["splits"]["val"]["subsets"]["val"]["text_to_image"]["queries"] > 0
    back = read_json(path)
    assert list(back) == ["val", "other"]
    assert math.isnan(back["val"].diagnostics.alignment)
    assert back["val"].subsets == result.subsets
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_files_that_are_not_results(tmp_path: Path, result: SplitResult) -> None:
    path = tmp_path / "x.json"
    for text, message in (
        ("{", "cannot read"),
        ("[]", "found None"),
        ('{"format": "pairtile.evaluation"}', "version 1"),
    ):
        path.write_text(text)
        with pytest.raises(PairtileError, match=message):
            read_json(path)
    with pytest.raises(PairtileError, match="cannot read"):
        read_json(tmp_path / "missing.json")
    with pytest.raises(PairtileError, match="cannot write"):
        write_json(path / "below-a-file.json", [result])


def test_both_tables_show_the_figures(result: SplitResult) -> None:
    recall = f"{result.retrieval.text_to_image.recall_at_1:.1%}"
    markdown = to_markdown([result])
    row = next(line for line in markdown.splitlines() if line.startswith("| val | text→image"))
    assert row.split(" | ")[2] == recall
    assert all(line.count("|") == markdown.splitlines()[2].count("|") for line in markdown.splitlines()[2:8])
    output = io.StringIO()
    print_results([result], Console(file=output, width=200))
    for text in (markdown, output.getvalue()):
        for expected in (recall, "val/without_drawing_in_train", "Zero-shot classification", "6 samples skipped"):
            assert expected in text


def test_a_narrow_terminal_breaks_no_figure(result: SplitResult) -> None:
    output = io.StringIO()
    print_results([result], Console(file=output, width=80))
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for row in retrieval_rows([result]):
        assert any(all(cell in line for cell in row[1:]) for line in lines)


def test_square_brackets_are_no_markup(result: SplitResult) -> None:
    named = result.model_copy(update={"split": "[bold]x", "subsets": {"[bold]x": result.retrieval}})
    output = io.StringIO()
    print_results([named], Console(file=output, width=200))
    assert "[bold]x" in output.getvalue()
