"""The protocols of the papers, dry-run from end to end with tiny models."""

import json

import pytest

from benchmarks import protocols
from benchmarks.protocols import PROTOCOLS, main, sample_arguments, table

pytest.importorskip("torch_fidelity")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("protocol", "rows"),
    [
        ("agentsd", ["Stable Diffusion", "AgentSD 40%"]),
        ("mediators", ["4 mediators", "16 mediators"]),
        ("linfusion", ["Stable Diffusion", "LinFusion"]),
    ],
)
def test_a_dry_run_prints_the_papers_table_and_is_not_measured_twice(protocol, rows, tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    argv = [protocol, "--tiny", "--out", str(tmp_path), "--device", "cpu", "--rows", *rows]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / protocol / "tiny" / "results.json").read_text())
    assert [row["row"] for row in result["rows"]] == rows and result["source"] in printed
    assert all(value > 0 for row in result["rows"] for name, value in row["values"].items() if name.startswith("FD"))
    assert all(row["seconds_per_image"] > 0 for row in result["rows"])
    first, second = (next(iter(row["values"].values())) for row in result["rows"][:2])
    assert first != second, "another method draws other images"
    monkeypatch.setattr(protocols, "measure_row", lambda *args: pytest.fail("measured again"))
    assert main(argv) == 0


def test_commands_are_those_of_the_papers(tmp_path):
    from train.sample import parse_arguments

    for name, protocol in PROTOCOLS.items():
        argv = [name, "--reference", "r", "--class-names", "c.txt", "--layers", "l.safetensors"]
        options = protocols.parse_arguments(argv)
        for row in protocol.rows:
            parsed = parse_arguments(sample_arguments(options, protocol, row, tmp_path))
            assert parsed.num == protocol.pictures and parsed.model == protocol.model
    assert PROTOCOLS["mediators"].pictures == 50000 and "250" in PROTOCOLS["mediators"].arguments


def test_published_numbers_are_beside_the_measured_ones():
    protocol = PROTOCOLS["agentsd"]
    found = {"values": {"FID": 30.0, "KID": {"mean": 0.01}}, "seconds_per_image": 1.5}
    lines = table(protocol, [(protocol.rows[0], found)])
    assert (
        "30 (28.84)" in lines[2] and "1.5 (2.62)" in lines[2] and "0.01" in lines[2] and lines[-1] == protocol.caution
    )


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["agentsd"], "give --reference, or --tiny"),
        (["agentsd", "--reference", "r"], "give --class-names"),
        (["linfusion", "--reference", "r", "--class-names", "c"], "give --layers"),
    ],
)
def test_what_is_missing_is_named(argv, sentence, capsys):
    with pytest.raises(SystemExit):
        protocols.parse_arguments(argv)
    assert sentence in capsys.readouterr().err


def test_a_row_that_is_none_is_named(tmp_path, capsys):
    assert main(["mediators", "--tiny", "--rows", "5 mediators", "--out", str(tmp_path)]) == 2
    assert "'5 mediators'; expected some of 4 mediators" in capsys.readouterr().err
