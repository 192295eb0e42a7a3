"""A stage as a Prefect task: the store decides what runs, and Prefect keeps no result of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

import tasks.stage
from tasks.errors import InputError, StorageUnavailable
from tasks.progress import StageTiming, Timings, observed_by
from tasks.stage import Stage, retried, stage, step
from tasks.store.results import Store, StoredResult

RETRIES = 2


class Word(StoredResult):
    """What the stages of this module make."""

    text: str


class Script:
    """What a stage's function does, call by call: raise that error, or give that word."""

    def __init__(self, *steps: Exception | str) -> None:
        self.steps, self.calls = list(steps), 0

    def __call__(self, folder: Path, word: str) -> Word:
        step = self.steps[min(self.calls, len(self.steps) - 1)]
        self.calls += 1
        if isinstance(step, Exception):
            raise step
        (folder / "word.txt").write_text(step)
        return Word(text=step)


def scripted(script: Script, **retries: Any) -> Stage[[str], Word]:
    """A stage that does what the script says."""

    def say(folder: Path, word: str) -> Word:
        """Say a word."""
        return script(folder, word)

    return stage(key=lambda word: word, version="1", tags=("cpu",), **retries)(say)


@pytest.fixture(scope="module", autouse=True)
def server(prefect_server: str) -> Iterator[None]:
    """Flows of this process use the shared server; heartbeats would cost a second a flow."""
    with temporary_settings(updates={PREFECT_API_URL: prefect_server, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


@pytest.fixture(autouse=True)
def entries(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, and no waiting between retries; gives the folder of the stage's entries."""
    monkeypatch.setattr(tasks.stage, "RETRY_BASE_SECONDS", 0)
    return own_store / "say"


def run(say: Stage[[str], Word], word: str = "word") -> tuple[Word, StageTiming]:
    """Run a stage in a flow of its own."""
    timings = Timings()

    @flow(name="say", log_prints=False)
    def saying() -> Word:
        with observed_by(timings):
            return say(word)

    result = saying()
    (timing,) = timings.stages
    return result, timing


def test_stage_runs_once(entries: Path) -> None:
    script = Script("hello")
    say = scripted(script)
    result, timing = run(say)
    assert (result.text, timing.name, timing.cached) == ("hello", "say", False)
    again, timing = run(say)
    assert (again, timing.cached, script.calls) == (result, True, 1)
    assert (entries / say.key("word") / "word.txt").read_text() == "hello"


def test_other_input_is_other_work() -> None:
    script = Script("hello")
    say = scripted(script)
    run(say, "one")
    _, timing = run(say, "two")
    assert (timing.cached, script.calls) == (False, 2)


def test_other_version_is_other_work() -> None:
    def say(folder: Path, word: str) -> Word:
        return Word(text=word)

    first, second = (stage(key=lambda word: word, version=version)(say) for version in ("1", "2"))
    assert first.key("word") != second.key("word")


def test_stage_whose_entry_is_gone_runs_again(entries: Path) -> None:
    script = Script("hello")
    say = scripted(script)
    run(say)
    shutil.rmtree(entries)
    result, timing = run(say)
    assert (result.text, timing.cached, script.calls) == ("hello", False, 2)
    assert run(say)[1].cached


def test_file_that_lost_its_end_runs_the_stage_again(entries: Path) -> None:
    script = Script("hello")
    say = scripted(script)
    run(say)
    (entries / say.key("word") / "word.txt").write_text("hell")
    _, timing = run(say)
    assert (timing.cached, script.calls) == (False, 2)
    assert (entries / say.key("word") / "word.txt").read_text() == "hello"


def test_the_entry_is_the_only_record(entries: Path) -> None:
    """No second copy of the result lies beside the entries, and a hit writes none."""
    say = scripted(Script("hello"))
    for _ in range(2):
        run(say)
    assert [path.name for path in entries.parent.iterdir()] == [entries.name]
    assert [path.name for path in entries.iterdir()] == [say.key("word")]


def test_hit_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    say = scripted(Script("hello"))
    run(say)
    loads, load = [], Store.load

    def counted(of: Store, *args: Any, **kwargs: Any) -> Any:
        loads.append(args)
        return load(of, *args, **kwargs)

    monkeypatch.setattr(Store, "load", counted)
    assert run(say)[1].cached
    assert len(loads) == 1


def test_outside_of_a_flow_a_stage_runs_plainly(entries: Path) -> None:
    """Once, without a task: a batch tries its captures again."""
    script = Script(StorageUnavailable("no answer"), "hello")
    say, timings = scripted(script, **retried(RETRIES, StorageUnavailable)), Timings()
    with observed_by(timings):
        with pytest.raises(StorageUnavailable):
            say("word")
        assert [say("word").text for _ in range(2)] == ["hello"] * 2
    assert [timing.cached for timing in timings.stages] == [False, True]
    assert script.calls == 2


def test_step_runs_each_time_and_is_tried_again() -> None:
    calls: list[str] = []

    @step(**retried(RETRIES, StorageUnavailable))
    def spell(word: str) -> str:
        """Spell a word."""
        calls.append(word)
        if len(calls) == 1:
            raise StorageUnavailable("no answer")
        return " ".join(word)

    @flow(name="spell")
    def spelling() -> list[str]:
        return [spell(word) for word in ("one", "one")]

    timings = Timings()
    with observed_by(timings):
        assert spelling() == ["o n e"] * 2
    assert spell("two") == "t w o"
    assert calls == ["one", "one", "one", "two"]
    assert [(timing.name, timing.cached) for timing in timings.stages] == [("spell", False)] * 2


def test_fault_that_can_pass_is_tried_again() -> None:
    script = Script(StorageUnavailable("no answer"), StorageUnavailable("no answer"), "hello")
    result, timing = run(scripted(script, **retried(RETRIES, StorageUnavailable)))
    assert (result.text, timing.cached, script.calls) == ("hello", False, 3)


def test_retries_end() -> None:
    script = Script(StorageUnavailable("no answer"))
    with pytest.raises(StorageUnavailable, match="no answer"):
        run(scripted(script, **retried(RETRIES, StorageUnavailable)))
    assert script.calls == 1 + RETRIES


@pytest.mark.parametrize(
    ("error", "faults"),
    [
        (InputError("wrong"), ()),
        (InputError("wrong"), (InputError,)),
        (ValueError("a fault of ours"), (StorageUnavailable,)),
    ],
)
def test_what_does_not_pass_is_not_tried_again(
    error: Exception, faults: tuple[type[Exception], ...], entries: Path
) -> None:
    script = Script(error, "hello")
    with pytest.raises(type(error), match=str(error)):
        run(scripted(script, **retried(RETRIES, *faults)))
    assert script.calls == 1
    assert list(entries.iterdir()) == []


def test_all_faults_are_tried_again_where_none_is_named() -> None:
    script = Script(ValueError("now and then"), "hello")
    run(scripted(script, **retried(1)))
    assert script.calls == 2


def test_failed_stage_is_not_cached() -> None:
    script = Script(ValueError("once"), "hello")
    say = scripted(script)
    with pytest.raises(ValueError, match="once"):
        run(say)
    result, timing = run(say)
    assert (result.text, timing.cached) == ("hello", False)
