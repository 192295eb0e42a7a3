"""Problems grouped for the report: one line for each kind."""

from __future__ import annotations

from tasks.errors import Problem, grouped


def blurred(number: int) -> Problem:
    what = f"looks blurred (sharpness {number / 10}, the capture's median is 30.5)"
    return Problem(where=f"views/view_{number:03d}.png", what=what, todo="take it again if it is blurred")


def test_problems_that_differ_in_numbers_only_are_one_line_with_two_examples() -> None:
    assert grouped([blurred(number) for number in (7, 8, 19)]) == (
        "3 files (views/view_007.png, views/view_008.png, ...): looks blurred (sharpness 0.7, the capture's median is"
        " 30.5); take it again if it is blurred",
    )


def test_two_problems_of_a_kind_are_both_named() -> None:
    (line,) = grouped([blurred(1), blurred(22)])
    assert line.startswith("2 files (views/view_001.png, views/view_022.png): looks blurred")


def test_a_single_problem_is_told_as_it_is() -> None:
    assert grouped([blurred(1)]) == (str(blurred(1)),)
    assert grouped([]) == ()


def test_each_kind_has_a_line_in_the_order_of_the_first() -> None:
    empty = Problem(where="views/a.png", what="shows nothing of the object", todo="it is left out")
    lines = grouped([blurred(1), empty, blurred(2), empty.model_copy(update={"where": "views/b.png"})])
    assert [line.partition(" files")[0] for line in lines] == ["2", "2"]
    assert "looks blurred" in lines[0] and "views/a.png, views/b.png" in lines[1]


def test_another_fault_or_another_cure_is_another_kind() -> None:
    first = blurred(1)
    others = [first.model_copy(update={"todo": "remove it"}), first.model_copy(update={"what": "is dark"})]
    assert len(grouped([first, *others])) == 3
