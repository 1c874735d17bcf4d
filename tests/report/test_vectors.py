"""The section on vectors: causes first, then curves over training, then the final figures."""

import re

from recclr.report.vectors import section_of

FIGURES = {"alignment": 1.25, "user_rank": 6.5, "user_rank_limit": 8.0, "overlap": 0.25} | {
    f"user_norm_{name}": value for name, value in (("q1", 0.5), ("median", 1.0), ("q3", 1.5))
}


def event(epoch, stage="selection", **figures):
    return {"kind": "monitor", "stage": stage, "step": 4, "epoch": epoch, "figures": figures}


def charts(html):
    return dict(re.findall(r'aria-label="(.*?)".*?(<title>.*?)</svg>', html, flags=re.S))


def test_nothing_is_said_of_a_run_without_monitors():
    assert section_of([], {}) == ""
    assert section_of([{"kind": "step", "stage": "selection", "step": 1}], {}) == ""


def test_causes_stand_before_curves_and_figures():
    cause = {"cause": "x", "text": "two users <b> share a list", "advice": "give them a history"}
    warning = {"kind": "warning", "stage": "selection", "step": 8, "epoch": 2.0, **cause}
    refit = warning | {"stage": "final", "text": "said in the end"}
    html = section_of(
        [event(1.0, alignment=1.5), event(2.0, alignment=1.25), warning, refit],
        {"figures": FIGURES, "causes": [cause | {"text": "one list"}], "definitions": {"d": "e"}},
    )
    notes = re.findall(r'<p class="note">(.*?)</p>', html)
    assert notes == [
        "The final model: one list. What to do: give them a history.",
        "At epoch 2.0: two users &lt;b&gt; share a list. What to do: give them a history.",
    ]
    order = [html.index(text) for text in ("one list", "<svg", "6.5 of at most 8", "<details>")]
    assert order == sorted(order)
    assert ">25.0%<" in html
    assert "0.5, 1, 1.5" in html
    assert list(charts(html)) == ["Alignment by epoch"]


def test_curves_are_of_the_selection_and_have_the_points_that_are_there():
    log = [
        event(1.0, user_rank=3.0, item_rank=2.0),
        event(2.0, user_rank=4.0),
        event(3.0, user_rank=5.0, item_rank=6.0),
        event(1.0, stage="refit", user_rank=99.0),
    ]
    found = charts(section_of(log, {}))
    assert list(found) == ["Effective rank by epoch"]
    users, items = re.findall(r'points="(.*?)"', found["Effective rank by epoch"])
    assert (len(users.split()), len(items.split())) == (3, 2)
    assert ">users<" in found["Effective rank by epoch"]
    assert "99" not in found["Effective rank by epoch"]
