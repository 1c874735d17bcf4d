"""The prepare scripts parse their sources, refuse others, and know the prepared sets."""

import importlib.util
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("RECCLR_DATA") or ROOT / "../shared/data")
FOLDERS = {
    "gowalla": "gowalla-lightgcn",
    "movietweetings": "movietweetings-2013",
    "movielens": "ml-100k",
}


def load(name: str):
    path = ROOT / "datasets" / name / "prepare.py"
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "datasets" / name / "prepare.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_prepared_set_is_verified_and_left_alone(name):
    folder = DATA / FOLDERS[name]
    if not folder.is_dir():
        pytest.skip(f"no {folder}; set RECCLR_DATA")
    done = run(name, "--out", str(folder))
    assert (done.returncode, "verified" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize("name", FOLDERS)
def test_without_the_raw_files_it_says_what_to_download(name, tmp_path):
    done = run(name, "--out", str(tmp_path / "out"), "--raw", str(tmp_path))
    assert done.returncode == 3
    assert "download it from https://" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_another_edition_is_refused(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::2::7::1362062307\n")
    (tmp_path / "movies.dat").write_text("2::Heat (1995)::Crime\n")
    done = run("movietweetings", "--out", str(tmp_path / "out"), "--raw", str(tmp_path))
    assert done.returncode == 3
    assert "expected 141,695 rows, found 1" in done.stderr


def test_other_rows_of_the_right_number_are_refused():
    fetch = load("gowalla").__dict__
    frame = pl.DataFrame({"user_id": [1, 2], "item_id": [3, 4]})
    same = fetch["Expected"](2, ("user_id", "item_id"), sys.modules["fetch"].digest(frame[::-1]))
    sys.modules["fetch"].require(frame, same, "pairs")
    changed = pl.DataFrame({"user_id": [1, 2], "item_id": [3, 5]})
    with pytest.raises(fetch["PrepareError"], match="another edition"):
        sys.modules["fetch"].require(changed, same, "pairs")


def test_gowalla_lines():
    found = load("gowalla").parse(b"0 5 3\n1\n2 4 \n")
    assert found.rows() == [(0, 3), (0, 5), (2, 4)]
    with pytest.raises(load("gowalla").PrepareError, match="line 2"):
        load("gowalla").parse(b"0 1\nx 2\n")


def test_movietweetings_lines():
    module = load("movietweetings")
    ratings = module.parse_ratings(b"7::22::10::300\n5::11::8::200\n")
    assert ratings.rows() == [(5, 11, 8, 200), (7, 22, 10, 300)]
    movies = module.parse_movies("22::Amélie (2001)::Comedy|Romance\n11::No year::\n".encode())
    assert movies.rows() == [
        (11, "No year", None, []),
        (22, "Amélie (2001)", 2001, ["Comedy", "Romance"]),
    ]


def test_movielens_archive(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("ml-100k/u.data", "3\t9\t4\t500\n2\t8\t5\t400\n")
        archive.writestr("ml-100k/u.user", "2|31|F|artist|90210\n3|44|M|none|00501\n")
        archive.writestr("ml-100k/u.genre", "unknown|0\nDrama|1\nWar|2\n")
        archive.writestr(
            "ml-100k/u.item", "9|Die Brücke (1959)|22-Oct-1959||url|0|1|1\n".encode("latin-1")
        )
    (tmp_path / "ml-100k.zip").write_bytes(buffer.getvalue())
    tables = load("movielens").build(tmp_path)
    assert tables["interactions"].rows() == [(2, 8, 5, 400), (3, 9, 4, 500)]
    assert tables["users"]["zip_code"].to_list() == ["90210", "00501"]
    row = (9, "Die Brücke (1959)", "22-Oct-1959", 1959, ["Drama", "War"])
    assert tables["items"].rows() == [row]


@pytest.fixture
def fetch():
    load("gowalla")
    return sys.modules["fetch"]


class Response(io.BytesIO):
    """What urlopen gives: a body, and the address that it came from in the end."""

    def __init__(self, body: bytes, url: str) -> None:
        super().__init__(body)
        self.url = url


def test_only_https_is_fetched(fetch):
    with pytest.raises(fetch.PrepareError, match="only https"):
        fetch.fetch("file:///etc/passwd")


def test_a_redirect_away_from_https_is_refused(fetch, monkeypatch):
    plain = Response(b"rows", "http://example.org/rows.txt")
    monkeypatch.setattr(fetch.urllib.request, "urlopen", lambda url, timeout: plain)
    with pytest.raises(fetch.PrepareError, match="only https"):
        fetch.fetch("https://example.org/rows.txt")


@pytest.mark.parametrize(("size", "refused"), [(10, False), (11, True)])
def test_a_body_over_the_limit_is_refused(fetch, monkeypatch, size, refused):
    url = "https://example.org/rows.txt"
    monkeypatch.setattr(
        fetch.urllib.request, "urlopen", lambda url, timeout: Response(b"x" * size, url)
    )
    if refused:
        with pytest.raises(fetch.PrepareError, match="larger than 10 bytes"):
            fetch.fetch(url, max_bytes=10)
    else:
        assert fetch.fetch(url, max_bytes=10) == b"x" * size


def test_no_network_is_said_with_the_way_around_it(fetch, monkeypatch):
    def broken(url, timeout):
        raise fetch.urllib.error.URLError("no route")

    monkeypatch.setattr(fetch.urllib.request, "urlopen", broken)
    with pytest.raises(fetch.PrepareError, match=r"no route.*--raw FOLDER"):
        fetch.fetch("https://example.org/rows.txt")


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("movielens", {"ml-100k.zip": b"PK but no archive"}),
        ("movietweetings", {"ratings.dat": b"\xff\xfe", "movies.dat": b""}),
        ("gowalla", {"train.txt": "Schlüssel fehlt".encode(), "test.txt": b""}),
    ],
)
def test_damaged_sources_end_with_one_message(name, files, tmp_path):
    for file, body in files.items():
        (tmp_path / file).write_bytes(body)
    done = run(name, "--out", str(tmp_path / "out"), "--raw", str(tmp_path))
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_tables_are_written_once_and_a_missing_one_is_made_again(fetch, tmp_path, capsys):
    pairs = pl.DataFrame({"user_id": [1, 2], "item_id": [3, 4]})
    tables = {"interactions": pairs, "items": pl.DataFrame({"item_id": [3, 4]})}
    expected = {
        "interactions": fetch.Expected(2, ("user_id", "item_id"), fetch.digest(pairs)),
        "items": fetch.Expected(2, ("item_id",)),
    }
    builds = []

    def build(raw):
        builds.append(raw)
        return tables

    for _ in range(2):
        fetch._prepare(tmp_path, None, build, expected)
    assert (len(builds), "verified" in capsys.readouterr().out) == (1, True)
    (tmp_path / "items.parquet").unlink()
    fetch._prepare(tmp_path, None, build, expected)
    assert len(builds) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "interactions.parquet",
        "items.parquet",
    ]


def test_nothing_is_written_where_one_table_is_refused(fetch, tmp_path):
    tables = {"a": pl.DataFrame({"x": [1]}), "b": pl.DataFrame({"x": [1, 2]})}
    expected = {"a": fetch.Expected(1, ("x",)), "b": fetch.Expected(2, ("y",))}
    with pytest.raises(fetch.PrepareError, match=r"b: expected columns \['y'\]"):
        fetch._prepare(tmp_path, None, lambda raw: tables, expected)
    assert not list(tmp_path.iterdir())
