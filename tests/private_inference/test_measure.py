"""Measurements go on where they stopped; the command line says what happened."""

import json

import pytest
from running import private_environment  # noqa: F401

from entropy_lib.explore.tiny_model import TINY
from entropy_lib.private_inference import __main__ as command
from entropy_lib.private_inference.architecture import operations
from entropy_lib.private_inference.blocks import block_architectures
from make import measure


@pytest.fixture
def fake(monkeypatch):
    """The plans that would have run; each step costs one byte and one second."""
    plans = []

    def run_plan(plan, values, protocol, **options):
        assert protocol == "CHEETAH"
        assert set(values) == set(plan["inputs"])
        plans.append(plan)
        cost = {"bytes": 1, "seconds": 1.0 + options["delay"], "cpu_seconds": 1.0, "messages": 1}
        return {}, [{"part": step["part"], "operation": step["operation"], **cost} for step in plan["steps"]]

    monkeypatch.setattr(measure, "run_plan", run_plan)
    monkeypatch.setattr(measure, "VOCABULARY", 64)
    monkeypatch.setattr(measure, "random_values", lambda plan: dict.fromkeys(plan["inputs"]))
    return plans


def test_every_kind_of_operation_and_block_is_measured():
    todo = list(measure.tasks(128))
    for section in ("operations", "blocks"):
        seen = {step["operation"] for where, _, plan, _ in todo if where == section for step in plan["steps"]}
        assert seen >= {o.name for a in block_architectures().values() for o in operations(a, 128)}
    names = {name for section, name, _, _ in todo if section == "blocks"}
    required = ("SM+LN+G", "SM+LN+R", "SM+LN", "SM+G", "SM+R", "SM+ScFFN", "SM+ScFuFFN")
    assert names >= {f"{variant}, T=128" for variant in required}
    rounds = [(len(plan["steps"]), delay) for section, _, plan, delay in todo if section == "rounds"]
    assert [delay for _, delay in rounds] == [0.0, measure.DELAY]
    assert rounds[0][0] == rounds[1][0] >= 14


def test_operations_are_measured_at_both_lengths_and_blocks_at_one():
    at = {length: list(measure.tasks(length)) for length in (128, 256)}
    kinds = {n: {plan["steps"][0]["operation"] for s, _, plan, _ in at[n] if s == "operations"} for n in at}
    assert kinds[128] == kinds[256] >= {"gelu", "layernorm", "softmax", "linear", "embed"}
    assert {section for section, *_ in at[256]} == {"operations"}


def test_an_interrupted_measurement_goes_on(fake, tmp_path, monkeypatch, capsys):
    arguments = ["--context-length", "128", "--output", str(tmp_path / "record.json")]
    whole = len(list(measure.tasks(128)))
    run_plan, stop = measure.run_plan, iter([None, None, KeyboardInterrupt])

    def interrupted(*positional, **options):
        if error := next(stop):
            raise error
        return run_plan(*positional, **options)

    monkeypatch.setattr(measure, "run_plan", interrupted)
    assert measure.main(arguments) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "record.json").read_text())["operations"]) == 2
    monkeypatch.setattr(measure, "run_plan", run_plan)
    assert measure.main(arguments) == 0
    assert len(fake) == whole
    record = json.loads((tmp_path / "record.json").read_text())
    assert sum(len(record[section]) for section in ("operations", "rounds", "blocks")) == whole
    assert record["command"] == "python data/make/measure.py"
    assert measure.main(arguments) == 0
    assert len(fake) == whole  # nothing was measured twice


def test_only_what_is_asked_for(fake, tmp_path):
    arguments = ["--context-length", "128", "--only", "blocks SM+R", "--output", str(tmp_path / "record.json")]
    assert measure.main(arguments) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert list(record["blocks"]) == ["SM+R, T=128"]
    assert record["blocks"]["SM+R, T=128"]["bytes"] == len(fake[0]["steps"])


def test_a_missing_environment_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ENTROPY_LIB_PRIVATE_PYTHON", str(tmp_path / "nowhere"))
    assert measure.main(["--only", "relu 128", "--output", str(tmp_path / "record.json")]) == 2
    assert command.main([]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error:") and "make private" in line for line in lines] == [True, True]


def test_what_no_measurement_can_start_from_is_one_line(fake, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "run_two_party", lambda *_, **__: pytest.fail("started"))
    torn = tmp_path / "torn.json"
    torn.write_text('{"operations": {')
    assert measure.main(["--output", str(torn)]) == 2
    torn.with_name("other.json").write_text('{"mine": 1}')
    assert measure.main(["--output", str(tmp_path / "other.json")]) == 2
    assert measure.main(["--context-length", "0", "--output", str(tmp_path / "r.json")]) == 2
    assert command.main(["--output", str(tmp_path)]) == 2
    assert command.main(["--output", str(tmp_path / "none" / "r.json")]) == 2
    words = ["torn.json is no whole record", "other.json is no whole record"]
    words += ["context_length must be positive", "--output must be", "--output must be"]
    lines = capsys.readouterr().err.splitlines()
    assert all(word in line for word, line in zip(words, lines, strict=True))
    assert torn.read_text() == '{"operations": {'
    assert not fake


def test_the_command_prints_parts_and_writes_a_record(monkeypatch, tmp_path, capsys):
    step = {"part": "softmax", "operation": "softmax", "bytes": 2_500_000, "seconds": 1.5, "cpu_seconds": 1.0}

    def run_two_party(model, ids, protocol, method, timeout):
        from entropy_lib.private_inference.two_party import TwoPartyResult

        return TwoPartyResult(None, 1e-4, protocol, [{**step, "messages": 3}])

    monkeypatch.setattr(command, "run_two_party", run_two_party)
    assert command.main(["--variant", "SM(0,0,1)+LN(a)+R+V", "--layers", "3", "--tokens", "8"]) == 0  # folds
    assert command.main(["--tokens", "8", "--output", str(tmp_path / "r.json")]) == 0
    assert "2.5 MB, 1.5 s, logits within 1.0e-04" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["steps"][0]["bytes"] == 2_500_000
    assert command.main(["--variant", "SM+X"]) == 2
    assert "unknown variant 'SM+X'" in capsys.readouterr().err


@pytest.mark.xdist_group("parties")
def test_the_command_continues_the_text_as_the_model_alone(private, tmp_path):
    arguments = ["--model", str(TINY), "--text", "def ", "--generate", "2"]
    arguments += ["--protocol", "SEMI2K", "--method", "optimized", "--output", str(tmp_path / "r.json")]
    assert command.main(arguments) == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["equal"]
    assert len(record["generated"]) == 2
