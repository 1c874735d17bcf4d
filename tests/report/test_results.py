"""Verdicts and warnings say what the figures say, and no more."""

import re

import pytest

from recclr.report.results import (
    Results,
    comparison,
    difference_table,
    headline,
    slices,
    verdict_of,
    warnings,
)


def plain(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html)).strip()


def rows_of(html: str) -> list[list[str]]:
    """Cells of every body row, tags removed."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", html, flags=re.S)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, flags=re.S) for row in rows]
    return [[plain(cell) for cell in row] for row in cells if row]


def of(metrics, select="recall@20") -> Results:
    return Results(metrics, select, (5, 20))


def set_difference(metrics, low, high, p_value=None):
    if p_value is None:
        p_value = 0.001 if low > 0 or high < 0 else 0.5
    entry = {"difference": (low + high) / 2, "low": low, "high": high, "p_value": p_value}
    metrics["differences"]["test"]["item_knn"]["all"]["recall@20"] = entry


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.001, 0.2, "better"),
        (-0.2, -0.001, "worse"),
        (-0.1, 0.1, "none"),
        (0.0, 0.1, "none"),
        (-0.1, 0.0, "none"),
        (0.0, 0.0, "none"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(low, high, verdict):
    assert verdict_of({"low": low, "high": high}) == verdict


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.03, 0.07, "the model is better (+0.0500, +0.0300 to +0.0700)"),
        (-0.07, -0.03, "the model is worse (-0.0500, -0.0700 to -0.0300)"),
        (-0.01, 0.03, "no difference is shown (+0.0100, -0.0100 to +0.0300)"),
    ],
)
def test_headline_gives_figure_interval_sizes_and_the_best_baseline(metrics, low, high, words):
    set_difference(metrics, low, high)
    text = plain(headline(of(metrics)))
    assert (
        "On test, the model's recall@20 is 0.3100 (95 % interval 0.2900 to 0.3300)"
        in text.replace("&#x27;", "'")
    )
    assert "over 1,234 users and 4,321 candidates" in text
    assert f"The best baseline, item_knn, has 0.2600: {words}." in text


def test_the_slice_that_selects_comes_first(metrics):
    part = Results(metrics, "recall@20", (5, 20), "cold_items_among_cold")
    text = plain(headline(part)).replace("&#x27;", "'")
    assert (
        "On test (cold items, among cold candidates), the model's recall@20 is 0.4500, over 77 "
        "users and 160 candidates. The best baseline, item_knn, has 0.2200: no difference is "
        "shown (+0.2300, -0.0100 to +0.4000)." in text
    )
    page = comparison(part, "test")
    assert [row[0] for row in rows_of(page)] == ["model", "item_knn", "popularity"]
    assert "n/a" in rows_of(page)[2]
    assert "(cold items, among cold candidates): mean over 77 users" in plain(page)
    (first, *_) = rows_of(difference_table(part))
    assert first[:2] == ["item_knn", "cold items, among cold candidates"]
    assert "Only 77 users were judged" in plain(warnings(part))


def test_a_slice_that_a_split_lacks_gives_way_to_everybody(metrics):
    assert headline(Results(metrics, "recall@20", (5, 20), "tail")) == headline(of(metrics))


def test_headline_follows_the_metric_of_selection(metrics):
    text = plain(headline(of(metrics, "ndcg@20")))
    assert "0.1700" in text
    assert "item_knn, has 0.1900." in text


def test_headline_without_intervals_and_baselines(metrics):
    metrics["test"] = {"model": metrics["test"]["model"]}
    metrics["intervals"] = metrics["differences"] = {}
    text = plain(headline(of(metrics)))
    assert "is 0.3100, over" in text
    assert "baseline" not in text


def test_headline_tells_an_unfinished_run_from_one_without_held_out_rows():
    assert "not finished" in headline(of({}))
    assert "Nothing was held out" in headline(of({"counts": {}, "definitions": {}}))


def test_validation_stands_in_where_there_is_no_test(metrics):
    for part in ("counts", "intervals", "differences"):
        metrics[part]["valid"] = metrics[part].pop("test")
    metrics["valid"] = metrics.pop("test")
    results = of(metrics)
    assert results.split == "valid"
    assert "On validation, the model" in headline(results)
    assert "on validation" in difference_table(results)


def test_test_comes_before_validation(metrics):
    metrics["valid"] = {"model": {"all": {"recall@20": 0.99}}}
    metrics["counts"]["valid"] = metrics["counts"]["test"]
    assert of(metrics).split == "test"


def test_rankers_stand_best_first_after_the_model(metrics):
    assert of(metrics).rankers("test") == ["model", "item_knn", "popularity"]
    metrics["test"]["popularity"]["all"]["recall@20"] = 0.9
    assert of(metrics).rankers("test") == ["model", "popularity", "item_knn"]


def test_a_good_run_has_no_warnings(metrics):
    assert warnings(of(metrics)) == ""
    assert warnings(of({})) == ""


def test_a_baseline_above_the_model_is_a_warning(metrics):
    text = plain(warnings(of(metrics, "ndcg@20")))
    assert text == "The baseline item_knn has a higher ndcg@20 than the model."


def test_few_users_dropped_users_missing_cold_items_and_skipped_baselines_are_warnings(metrics):
    counts = metrics["counts"]["test"]
    counts["all"] |= {"users": 12, "dropped_users": 3456}
    del counts["cold_items"]
    metrics["skipped_baselines"] = {"ease": "90,000 items are too many"}
    text = plain(warnings(of(metrics)))
    for words in (
        "Only 12 users were judged",
        "3,456 held-out users are not in the figures",
        "No held-out item is cold",
        "Baseline ease was left out: 90,000 items are too many.",
    ):
        assert words in text
    assert warnings(of(metrics)).count('class="note"') == 4


def test_comparison_marks_the_best_of_each_column_and_the_model(metrics):
    html = comparison(of(metrics), "test")
    assert rows_of(html) == [
        ["model", "0.1200", "0.3100 0.2900\N{EN DASH}0.3300", "0.1400", "0.1700"],
        ["item_knn", "0.1100", "0.2600", "0.1300", "0.1900"],
        ["popularity", "0.0300", "0.0800", "0.0200", "0.0400"],
    ]
    best = [plain(cell) for cell in re.findall(r'<td class="best">(.*?)</td>', html)]
    assert best == ["0.1200", "0.3100 0.2900\N{EN DASH}0.3300", "0.1400", "0.1900"]
    assert re.findall(r'<tr class="model"><td>(\w+)', html) == ["model"]
    assert "mean over 1,234 users with 5,678 relevant items, ranked among 4,321 candidates" in html


def test_comparison_promises_no_intervals_where_there_are_none(metrics):
    assert "95 %" in comparison(of(metrics), "test")
    metrics["intervals"] = {}
    assert "95 %" not in comparison(of(metrics), "test")


def test_comparison_of_a_part_that_was_not_judged_is_empty(metrics):
    assert comparison(of(metrics), "valid") == ""


def test_slices_show_chance_and_say_where_a_ranker_has_no_figure(metrics):
    everyone, cold, among = rows_of(slices(of(metrics)))
    assert everyone == ["all users", "1,234", "0.3100", "0.2600", "0.0800"]
    assert cold == ["cold items, in the full ranking", "77", "n/a", "n/a", "n/a"]
    assert among == [
        "cold items, among cold candidates by chance 0.1250",
        "77",
        "0.4500",
        "0.2200",
        "n/a",
    ]


def test_slices_are_shaded_by_the_best_of_their_row(metrics):
    row = re.findall(r"<tr.*?</tr>", slices(of(metrics)), flags=re.S)[1]
    model, knn, popularity = map(float, re.findall(r"--shade\), ([\d.]+)\)", row))
    assert model > knn > popularity
    assert knn / model == pytest.approx(0.26 / 0.31, abs=0.02)


def test_differences_come_best_baseline_first_and_slices_are_folded_away(metrics):
    metrics["differences"]["test"]["chance"] = {
        "cold_items_among_cold": {
            "recall@20": {"difference": 0.3, "low": 0.2, "high": 0.4, "p_value": 0.001}
        }
    }
    shown, folded = difference_table(of(metrics)).split("<details>")
    assert [row[0] for row in rows_of(shown)] == ["item_knn", "popularity"]
    assert rows_of(folded) == [
        [
            "item_knn",
            "cold items, among cold candidates",
            "+0.2300",
            "-0.0100 to +0.4000",
            "0.061",
            "no difference shown",
        ],
        [
            "chance",
            "cold items, among cold candidates",
            "+0.3000",
            "+0.2000 to +0.4000",
            "0.001",
            "better",
        ],
    ]


def test_only_a_shown_difference_is_coloured(metrics):
    html = difference_table(of(metrics))
    assert re.findall(r'<td class="better">([^<]+)', html) == ["+0.0500", "+0.2300"]
    set_difference(metrics, -0.2, -0.1)
    assert re.findall(r'<td class="worse">([^<]+)', difference_table(of(metrics))) == ["-0.1500"]
    set_difference(metrics, -0.2, -0.1, p_value=0.136)
    assert 'class="worse"' not in difference_table(of(metrics))


def test_without_differences_there_is_no_section(metrics):
    metrics["differences"] = {"test": {}}
    assert difference_table(of(metrics)) == ""
