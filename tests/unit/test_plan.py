"""The plan of a dataset: what is to be done for each capture, from a folder or a list."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from flows.reconstruct import prepare
from tasks.capture.listing import list_capture, upload_key
from tasks.dataset.plan import Plan, Planned, plan
from tasks.dataset.upload import Upload
from tasks.errors import CaptureRefused, EmptyResult, InputError, Problem, StorageUnavailable
from tasks.inference.reconstruction import infer
from tasks.inference.registry import EngineChoice, resolve_engine
from tasks.settings import FusionParameters, InferParameters, Parameters
from tasks.store.claims import record_failure
from tasks.store.location import Location
from tests.support.own_settings import forget
from tests.support.published import mark_published
from tests.support.running import snapshot
from tests.support.tiny import tiny_capture

FUSION = resolve_engine("fusion")
PARAMETERS = Parameters(infer=InferParameters(fusion=FusionParameters(max_voxels=32)))
REFUSED = CaptureRefused("mug", [Problem(where="views/", what="are all black", todo="switch the light on")])

Made = Callable[..., str]
"""Makes a capture below the dataset and gives its URL."""


@pytest.fixture(autouse=True)
def two_attempts(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTURE2MESH_ATTEMPTS", "2")
    forget()


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return tmp_path / "set"


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "out")


@pytest.fixture
def made(dataset: Path) -> Made:
    content = tiny_capture()

    def make(name: str, *, views: bool = True) -> str:
        for path, data in content.items():
            if views or not path.startswith("views/"):
                file = dataset / name / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
        return str(dataset / name)

    return make


@pytest.fixture
def planned(dataset: Path, output: str) -> Callable[..., Plan]:
    def of(source: Path | str = dataset, *, retry: bool = False, parameters: Parameters = PARAMETERS) -> Plan:
        return plan(str(source), output, FUSION, parameters, retry=retry)

    return of


def key_of(url: str, engine: EngineChoice = FUSION) -> str:
    return upload_key(list_capture(url), engine.name, PARAMETERS)


def states(found: Plan) -> dict[str, str]:
    return {each.id: each.state for each in found.captures}


def one(found: Plan, name: str) -> Planned:
    (capture,) = [each for each in found.captures if each.id == name]
    return capture


def test_every_state(planned: Callable[..., Plan], made: Made, output: str) -> None:
    urls = {name: made(name) for name in ("cached", "changed", "faulty", "new", "published", "refused", "unlucky")}
    made("blind", views=False)
    for name in ("published", "changed"):
        mark_published(output, name, key_of(urls[name]))
    (Path(urls["changed"]) / "views" / "view_000.png").touch()
    record_failure(output, key_of(urls["refused"]), urls["refused"], REFUSED)
    for _ in range(2):
        record_failure(output, key_of(urls["faulty"]), urls["faulty"], EmptyResult("nothing came out"))
    record_failure(output, key_of(urls["unlucky"]), urls["unlucky"], StorageUnavailable("no network"))
    cached = list_capture(urls["cached"])
    prepared = prepare(cached, FUSION, PARAMETERS, Upload.of(cached, output, FUSION.name, PARAMETERS))
    infer(prepared.capture, prepared.cameras, FUSION, PARAMETERS.infer, None)

    found = planned()
    assert states(found) == {
        "blind": "invalid",
        "cached": "cached",
        "changed": "new",
        "faulty": "failed",
        "new": "new",
        "published": "published",
        "refused": "invalid",
        "unlucky": "new",
    }
    assert found.counts() == {"invalid": 2, "cached": 1, "new": 3, "failed": 1, "published": 1}
    assert [each.id for each in found.pending] == ["cached", "changed", "new", "unlucky"]
    assert one(found, "published").folder == "published/0123456789abcdef"
    assert one(found, "faulty").reason == "nothing came out"
    assert "are all black" in one(found, "refused").reason
    assert one(found, "blind").reason == "has no views"
    assert (one(found, "unlucky").attempts, one(found, "new").attempts) == (1, 0)
    for each in found.captures:
        assert each.upload.uri == str(Path(urls["new"]).parent / each.id) and each.listing is not None
        assert each.upload.key == key_of(each.upload.uri)

    again = planned(retry=True)
    assert {name for name, state in states(again).items() if state != states(found)[name]} == {"faulty", "refused"}
    assert (one(again, "faulty").state, one(again, "faulty").attempts) == ("new", 2)
    assert (one(again, "refused").state, one(again, "refused").attempts) == ("new", 1)

    for name in ("faulty", "refused"):
        (Path(urls[name]) / "depth" / "view_000.png").touch()
    cleared = planned()
    assert (one(cleared, "faulty").state, one(cleared, "faulty").attempts) == ("new", 0)
    assert (one(cleared, "refused").state, one(cleared, "refused").attempts) == ("new", 0)


def test_other_parameters_and_another_engine_are_other_work(
    planned: Callable[..., Plan], made: Made, dataset: Path, output: str
) -> None:
    mark_published(output, "mug", key_of(made("mug")))
    assert states(planned()) == {"mug": "published"}
    assert states(planned(parameters=Parameters())) == {"mug": "new"}
    trellis = EngineChoice(name="trellis", version="1", reason="asked for")
    assert states(plan(str(dataset), output, trellis, PARAMETERS)) == {"mug": "new"}
    assert states(plan(str(dataset), f"{output}-2", FUSION, PARAMETERS)) == {"mug": "new"}


def test_asset_that_was_removed_is_made_again(planned: Callable[..., Plan], made: Made, output: str) -> None:
    mark_published(output, "mug", key_of(made("mug")))
    found = one(planned(), "mug")
    assert (found.state, found.folder) == ("published", "mug/0123456789abcdef")
    shutil.rmtree(Path(output) / found.folder)
    assert states(planned()) == {"mug": "new"}


@pytest.mark.parametrize("data", [b"", b"{", b"null", b"\xff"])
def test_broken_pointer_is_none(data: bytes, planned: Callable[..., Plan], made: Made, output: str) -> None:
    made("mug")
    (Location.of(output) / "mug" / "latest.json").write(data)
    assert states(planned()) == {"mug": "new"}


def test_plan_writes_nothing(planned: Callable[..., Plan], made: Made, tmp_path: Path) -> None:
    made("mug")
    made("cup")
    before = snapshot(tmp_path)
    planned()
    planned(retry=True)
    assert snapshot(tmp_path) == before


def test_nothing_to_plan(planned: Callable[..., Plan], dataset: Path) -> None:
    for place in (dataset, f"{dataset}/nowhere"):
        with pytest.raises(InputError, match="no capture below it"):
            planned(place)
    with pytest.raises(InputError, match="nowhere"):
        planned("nowhere://set")


def test_capture_whose_path_can_name_no_asset_is_invalid(planned: Callable[..., Plan], made: Made) -> None:
    """Its asset would lie outside of the output; the others are none the worse for it."""
    made("mug")
    made("a\\..\\b")
    assert states(planned()) == {"mug": "new", "a\\..\\b": "invalid"}


def test_key_that_would_leave_the_output_is_invalid(output: str) -> None:
    memory = fsspec.filesystem("memory")
    for path, data in tiny_capture().items():
        memory.pipe_file(f"/planned/a/../../../mug/{path}", data)
        memory.pipe_file(f"/planned/good/{path}", data)
        memory.pipe_file(f"/planned/double//{path}", data)
    found = plan("memory://planned", output, FUSION, PARAMETERS)
    assert states(found) == {"a/../../../mug": "invalid", "double/": "invalid", "good": "new"}
    assert "rename" in one(found, "double/").reason


def write_list(dataset: Path, name: str, text: str | bytes) -> Path:
    path = dataset / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "mug\n\n  cups/tea  \nplate/\n"),
        ("list.txt", "plate\r\nmug\r\ncups/tea"),
        ("list.txt", "\ufeffmug\ncups/tea\n./plate\n"),
        ("list.csv", "capture\nmug\ncups/tea\nplate\n"),
        ("list.csv", "capture\rmug\rcups/tea\rplate\r"),
        ("list.csv", "\ufeffcapture,id\r\nmug,\r\ncups/tea,\r\nplate,\r\n"),
        ("list.csv", 'note,capture,id\nhello,mug,\n"a,\nb",cups/tea,tea\n,plate,,too,many\n'),
        ("list.csv", "capture,id\nmug\ncups/tea\nplate\n"),
        ("list.csv", "capture,id\n\nmug,mug\n\ncups/tea,tea\n\n\nplate,plate\n\n"),
        ("list.jsonl", '{"capture": "mug"}\n\n{"capture": "cups/tea"}\n {"capture": "plate", "id": "", "note": 1} \n'),
        ("list.jsonl", '\ufeff{"capture": "mug"}\n{"capture": "cups/tea"}\r\n{"capture": "plate"}\n'),
    ],
)
def test_list(name: str, text: str, planned: Callable[..., Plan], made: Made, dataset: Path) -> None:
    urls = [made("mug"), made("plate"), made("cups/tea")]
    made("not in the list")
    found = planned(write_list(dataset, name, text))
    assert states(found) == {"mug": "new", "plate": "new", "tea": "new"}
    assert [each.upload.uri for each in found.captures] == urls
    assert [each.upload.key for each in found.captures] == list(map(key_of, urls))


def test_list_names_ids_and_captures_anywhere(
    planned: Callable[..., Plan], made: Made, dataset: Path, tmp_path: Path
) -> None:
    mug = made("mug")
    shutil.copytree(mug, tmp_path / "elsewhere" / "mug")
    lines = [
        {"capture": "mug", "id": "first/mug"},
        {"capture": str(tmp_path / "elsewhere" / "mug"), "id": "second/mug"},
        {"capture": "../elsewhere/mug", "id": "third"},
        {"capture": f"file://{mug}", "id": "fourth"},
    ]
    found = planned(write_list(dataset, "list.jsonl", "\n".join(map(json.dumps, lines))))
    assert {each.id: each.upload.uri for each in found.captures} == {
        "first/mug": mug,
        "second/mug": str(tmp_path / "elsewhere" / "mug"),
        "third": str(tmp_path / "elsewhere" / "mug"),
        "fourth": mug,
    }


def test_missing_capture_of_a_list_does_not_stop_the_others(
    planned: Callable[..., Plan], made: Made, dataset: Path
) -> None:
    made("mug")
    made("deep")
    text = "mug\nnowhere\nnowhere://at/all\ndeep/views\n"
    found = planned(write_list(dataset, "list.txt", text))
    assert one(found, "mug").state == "new"
    assert found.counts() == {"new": 1, "invalid": 3}
    assert "no capture there" in one(found, "nowhere").reason
    assert [each.id for each in found.pending] == ["mug"]


def test_list_of_missing_captures_only_is_a_plan(planned: Callable[..., Plan], dataset: Path) -> None:
    assert planned(write_list(dataset, "list.txt", "nowhere\n")).counts() == {"invalid": 1}


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("list.txt", "", "no capture"),
        ("list.txt", b"\xff\xfe\x00", "is not a text file"),
        ("list.csv", "path,id\nmug,mug\n", "entry 1: capture"),
        ("list.csv", "mug\ncup\n", "entry 1: capture"),
        ("list.csv", 'capture\n"' + 200_000 * "x", "list.csv"),
        ("list.csv", "capture\nmug\0\n", "entry 1: capture"),
        ("list.jsonl", '{"capture": "mug"}\n{"capture": \n', "line 2: is not JSON"),
        ("list.jsonl", '"mug"', "entry 1"),
        ("list.jsonl", "[]", "entry 1"),
        ("list.jsonl", "null", "entry 1"),
        ("list.jsonl", '{"capture": 7}', "entry 1: capture"),
        ("list.jsonl", '{"capture": "mug", "id": ["a"]}', "entry 1: id"),
        ("list.jsonl", '{"capture": ""}', "entry 1: capture"),
        *(
            ("list.jsonl", json.dumps({"capture": "mug", "id": name}), "entry 1: id")
            for name in ("../mug", "a/../b", "/mug", "a\\b", "c:mug", "mug\n", "a//b", "mug/", ".", "a/./b")
        ),
    ],
)
def test_odd_list_is_told(
    name: str, text: str | bytes, told: str, planned: Callable[..., Plan], made: Made, dataset: Path
) -> None:
    made("mug")
    made("cup")
    path = write_list(dataset, name, text)
    with pytest.raises(InputError, match=name) as error:
        planned(path)
    assert told in str(error.value)


def test_list_that_is_not_there(planned: Callable[..., Plan], dataset: Path) -> None:
    with pytest.raises(InputError, match="no such list"):
        planned(dataset / "list.csv")


@pytest.mark.parametrize("text", ["mug\nother/mug\n", "mug\nmug\n", "mug\nnowhere/mug\n"])
def test_one_id_for_two_captures_is_refused(text: str, planned: Callable[..., Plan], made: Made, dataset: Path) -> None:
    """Their assets would replace each other's."""
    made("mug")
    made("other/mug")
    with pytest.raises(InputError, match="mug is the id of several captures"):
        planned(write_list(dataset, "list.txt", text))
