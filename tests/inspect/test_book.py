"""What the page reads of a run: rows, tokens, curves that grow, files that are damaged; and the server's refusals."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_runs import HOSTILE, answers_of, make_run, step_file, write_metrics

from tilt.errors import DataError
from tilt.inspect.book import Book, books
from tilt.inspect.server import Site, serve
from tilt.inspect.tables import Rows, first_difference, pieces, reckoned, repetition, suspects


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "made")


# --- tokens ---------------------------------------------------------------------------------------------------------------------


def test_a_token_that_ends_inside_a_character_has_its_bytes():
    assert pieces("aé你", [0, 1, 2, 3, 5], None) == (["a", None, None, None, None], [None, "c3", "a9", "e4bd", "a0"])
    assert pieces("aé", [0, 1], None) == (["a", "é"], [None, None])


@pytest.mark.parametrize("offsets", [None, [], [1], [0, 9], [0, 2, 1], ["x"], [0, 1, 2, 3]])
def test_offsets_that_do_not_fit_give_no_tokens(offsets):
    assert pieces("ab", offsets, 3)[0] == []


def test_the_first_difference_of_two_answers():
    def of(*ids):
        return {"ids": list(ids), "tokens": [], "completion": ""}

    assert (
        first_difference(of(5, 6, 7), of(5, 8)) == 1 and first_difference(of(5), of(5, 6)) == 1 and first_difference(of(5), of(5)) is None
    )


def test_repetition_is_the_share_of_triples_that_came_before():
    assert repetition("a b c a b c") == pytest.approx(0.25) and repetition("a b c d") == 0 and repetition("") == 0
    assert repetition("哈哈哈哈哈哈") == pytest.approx(0.75)


def test_suspects_are_good_and_odd():
    found = {
        "reward": [1.0, 0.0, 1.0] + [0.5] * 17,
        "length": [10] * 20,
        "kl": [0.1] * 20,
        "repetition": [0.9, 0.9] + [0.0] * 18,
        "truncated": [0] * 20,
    }
    found["kl"][2] = 9.0
    assert suspects(found) == [1, 0, 1] + [0] * 17
    assert suspects(found | {"reward": [1.0] * 20}) == [0] * 20


# --- a step ---------------------------------------------------------------------------------------------------------------------


def test_a_summary_says_of_each_row_what_its_tokens_say(run):
    book = Book(run)
    summary = book.summaries([10])["steps"]["10"]
    rows = pq.read_table(run / "rollouts/step_000010.parquet").to_pylist()
    for i, row in enumerate(rows):
        assert summary["reward"][i] == row["reward"] and summary["length"][i] == row["length"] and summary["group"][i] == row["group_id"]
        assert summary["clipped"][i] == sum(c in (-1, 1) for c in row["clip"])
        assert summary["kl"][i] == pytest.approx(sum(row["kl"]), rel=1e-3)
        assert summary["delta_max"][i] == pytest.approx(max(abs(x) for x in row["delta_ref"]), rel=1e-4)
        assert summary["push"][i] == pytest.approx(sum(abs(x) for x in row["push"]), rel=1e-3)
        assert (
            summary["parts"]["exact"][i] == pytest.approx(row["reward"] + 0.05, abs=1e-4)
            and summary["prompts"][summary["prompt"][i]] == row["prompt"]
        )
        detail = book.rows(10).detail(i)
        assert "".join(detail["tokens"]) == row["completion"] and detail["channels"]["push"] == pytest.approx(row["push"], rel=1e-4)
        assert len(detail["tokens"]) == len(detail["ids"]) and detail["checker"]["exact"]["gold"] == "42"
        assert (detail["top"] is None) == (i % 2 == 1)


def test_numbers_that_are_not_finite_are_said_and_never_zero(tmp_path):
    table = pa.table({
        "prompt": ["p"], "completion": ["ab"], "reward": pa.array([float("nan")]), "text_offsets": [[0, 1]], "push": pa.array([[float("inf"), float("nan")]]), "length": [2],
    })  # fmt: skip
    detail = Rows(table, 3).detail(0)
    assert detail["channels"]["push"] == ["inf", "nan"] and detail["reward"] == "nan"
    assert Rows(table, 3).summary()["reward"] == ["nan"]


def test_rows_without_tokens_or_channels_are_texts(tmp_path):
    table = pa.table({"prompt": ["p", "p", "q"], "completion": ["a", "b", "c"]})
    rows = Rows(table, 0)
    assert rows.groups == [0, 0, 1] and rows.detail(1)["tokens"] == [] and rows.summary()["kl"] == [None] * 3
    assert [r["row"] for r in rows.siblings(1)["rows"]] == [1, 0]


def test_what_is_no_file_of_rollouts_is_a_sentence(run):
    (run / "rollouts/step_000010.parquet").write_bytes(b"PAR1 torn")
    book = Book(run)
    assert "not a readable file" in book.summaries([0, 10])["steps"]["10"]["error"] and book.summaries([0])["steps"]["0"]["row"]
    with pytest.raises(DataError, match="not a readable file"):
        book.rows(10)
    with pytest.raises(DataError, match="holds no rollouts of step 7"):
        book.rows(7)
    pq.write_table(
        pa.table({"prompt": ["a"], "completion": ["b"]}).replace_schema_metadata({"schema_version": "99"}),
        run / "rollouts/step_000010.parquet",
    )
    with pytest.raises(DataError, match="schema version 99"):
        book.rows(10)
    assert [s["rows"] for s in book.steps()] == [32, 1, 32, 32]


def test_a_step_that_is_written_again_is_read_again(run):
    book = Book(run)
    before = book.summaries([10])["steps"]["10"]["reward"]
    step_file(run / "rollouts", 10, answers_of(99, 8))
    assert len(book.summaries([10])["steps"]["10"]["reward"]) == 8 != len(before) and book.rows(10).count == 8


def test_the_same_prompt_over_the_steps_and_a_search(run):
    book = Book(run)
    same = book.same(10, 0)["rows"]
    assert {r["step"] for r in same} == {0, 10, 20, 30} and len(same) == 16
    assert book.search("QUESTION 3", [10])["found"] == [[10, 12], [10, 13], [10, 14], [10, 15]]
    assert book.search("question", [])["found"][0] == [0, 0] and not book.search("zebra", [])["found"]


# --- curves and header ----------------------------------------------------------------------------------------------------------


def test_curves_grow_by_what_was_written_and_a_torn_line_waits(run):
    book = Book(run)
    first = book.metrics()
    assert first["step"] == list(range(40)) and first["columns"]["grad_norm"][5] == "nan" and first["columns"]["eval/accuracy"][1] is None
    write_metrics(run, [40])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "rew')
    more = book.metrics(first["next"])
    assert more["step"] == [40] and book.metrics(more["next"])["step"] == []
    with (run / "metrics.jsonl").open("a") as file:
        file.write('ard": 1}\n')
    assert book.metrics(more["next"])["columns"] == {"reward": [1]}


def test_a_log_that_was_cut_begins_anew(run):
    book = Book(run)
    cursor = book.metrics()["next"]
    write_metrics(run, range(3), mode="w")
    again = book.metrics(cursor)
    assert again["reset"] and again["step"] == [0, 1, 2]


def test_the_header_says_what_the_run_is(run):
    header = Book(run).header()
    assert (header["algorithm"], header["seed"], header["commit"], header["step"], header["steps"], header["status"]) == (
        "grpo",
        3,
        "abcdef123456",
        39,
        100,
        "finished",
    )
    assert header["alerts"] == [{"step": 20, "name": "entropy", "text": "the entropy fell to a fifth; healthy: above a third"}]
    assert list(header["channels"])[:3] == ["delta_ref", "push", "result"] and any("half precision" in note for note in header["notes"])


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.yaml", "a: [b"),
        ("env.json", "[1]"),
        ("env.json", "{"),
        ("result.json", "x"),
        ("metrics.jsonl", '{"step": "a"}\n[]\nx\n'),
        ("log.txt", "\x00" * 9),
    ],
)
def test_damaged_files_of_a_run_leave_the_rest(run, name, content):
    (run / name).write_text(content)
    book = Book(run)
    assert book.header()["name"] == "made" and len(book.steps()) == 4 and isinstance(book.metrics()["step"], list)


def test_runs_are_found_in_folders(tmp_path):
    make_run(tmp_path / "a/one", steps=1, count=4)
    make_run(tmp_path / "a/deep/two", steps=1, count=4)
    assert [book.name for book in books(tmp_path / "a")] == ["a/deep/two", "a/one"]
    with pytest.raises(DataError, match="holds no run"):
        books(tmp_path / "a/one/rollouts")


def test_a_hundred_thousand_answers_are_listed_in_seconds(tmp_path):
    import time

    texts = [{"prompt": f"q{i // 4}", "completion": "so the sum is 42", "reward": 0.5} for i in range(2500)]
    for step in range(4):
        step_file(tmp_path / "r/rollouts", step, texts)
    began = time.perf_counter()
    found = Book(tmp_path / "r").summaries(range(4))["steps"]
    assert sum(len(s["row"]) for s in found.values()) == 10_000 and time.perf_counter() - began < 10


def test_reading_needs_no_torch():
    code = "import sys, tilt.inspect.book, tilt.inspect.server, tilt.inspect.report, tilt.inspect.terminal, tilt.inspect.changed, tilt.inspect.imports, tilt.cli.view; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- the server -----------------------------------------------------------------------------------------------------------------


@contextmanager
def serving(*paths, **how):
    server = serve(Site([book for path in paths for book in books(path)]), port=0, **how)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def ask(server, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer, body


def test_the_server_answers_what_the_page_asks(run):
    with serving(run) as server:
        for path in ("/", "/page/main.js", "/page/style.css", "/page/uPlot.js", "/page/uPlot.css", "/api/runs", "/api/runs/0", "/api/runs/0/metrics?after=0", "/api/runs/0/steps", "/api/runs/0/rows?steps=0,10",
                     "/api/runs/0/rollouts/10/3", "/api/runs/0/siblings/10/3", "/api/runs/0/same/10/3", "/api/runs/0/search?q=sum&steps=10", "/api/runs/0/changed/10"):  # fmt: skip
            status, answer, body = ask(server, path)
            assert status == 200 and body, path
            assert (
                answer.headers["X-Content-Type-Options"] == "nosniff" and "default-src 'none'" in answer.headers["Content-Security-Policy"]
            )
            if path.startswith("/api"):
                json.loads(body)
            assert ask(server, path, If_None_Match=answer.headers["ETag"])[0] == 304
            assert ask(server, path, "HEAD")[2] == b""


@pytest.mark.parametrize("path, status", [("/api/runs/7", 404), ("/api/nothing", 404), ("/api/runs/0/rollouts/10/999", 422), ("/api/runs/0/rollouts/11/0", 422), ("/api/runs/0/rollouts/x/0", 404),
    ("/api/runs/0/siblings/10/99", 422), ("/page/../server.py", 404), ("/page/%2e%2e/%2e%2e/server.py", 404), ("//etc/passwd", 404), ("/../../etc/passwd", 404), ("/api/comparisons/0", 404)])  # fmt: skip
def test_what_is_not_there_is_refused_in_a_sentence(run, path, status):
    with serving(run) as server:
        found, _, body = ask(server, path)
        assert found == status and json.loads(body)["error"]


def test_other_hosts_and_other_pages_are_refused(run):
    with serving(run) as server:
        assert ask(server, "/api/runs", Host="evil.example:80")[0] == 403
        assert ask(server, "/api/runs", Host=f"localhost:{server.server_address[1]}")[0] == 200
        assert ask(server, "/api/runs", Origin="http://evil.example")[0] == 403 and ask(server, "/api/runs", Origin="null")[0] == 403
        assert ask(server, "/api/runs", Sec_Fetch_Site="cross-site")[0] == 403
        assert ask(server, "/api/runs", Origin=f"http://127.0.0.1:{server.server_address[1]}")[0] == 200
        assert ask(server, "/api/runs", "POST")[0] == 501 and ask(server, "/api/runs", "DELETE")[0] == 501


def test_an_open_address_needs_its_token(run):
    with serving(run, host="0.0.0.0") as server:
        assert server.token and f"token={server.token}" in server.url
        assert ask(server, "/api/runs")[0] == 403 and ask(server, "/api/runs?token=wrong")[0] == 403
        status, answer, _ = ask(server, f"/?token={server.token}")
        assert status == 200 and "HttpOnly" in answer.headers["Set-Cookie"]
        assert ask(server, "/api/runs", Cookie=f"tilt={server.token}")[0] == 200


def test_hostile_texts_are_plain_json(tmp_path):
    run = make_run(tmp_path / "h", steps=1, hostile=True)
    with serving(run) as server:
        for row in range(len(HOSTILE)):
            status, _, body = ask(server, f"/api/runs/0/rollouts/0/{row}")
            assert status == 200 and json.loads(body)["completion"] == HOSTILE[row].encode("utf-8", "replace").decode()
        assert ask(server, "/api/runs/0/rows?steps=0")[0] == 200 and ask(server, "/api/runs/0/changed/0")[0] == 200


def test_summaries_use_the_reduction_that_they_name():
    table = pa.table(
        {
            "prompt": ["p"],
            "completion": ["abc"],
            "entropy": pa.array([[1.0, float("nan"), 3.0]]),
            "kl": pa.array([[0.5, float("nan"), 0.25]]),
        }
    )
    summary = Rows(table, 0).summary()
    assert summary["entropy"] == [2.0] and summary["kl"] == [0.75] and np.isfinite(summary["kl"][0])


def test_a_reward_is_reckoned_from_its_parts_and_weights(tmp_path):
    assert reckoned(1.1, {"exact": 1.0, "length": 0.2}, {"exact": 1.0, "length": 0.5}) == "= 1 exact + 0.5 × 0.2 length"
    assert reckoned(1.0, {"exact": 1.0, "length": 0.2}, {"exact": 1.0, "length": 0.5}) == "← 1 exact + 0.5 × 0.2 length", "a limit cut it"
    assert reckoned(1.0, {"exact": 1.0, "judge": "nan"}, {}) == "= 1 exact + nothing from judge" and reckoned(1.0, {}, {}) == ""
    book = Book(make_run(tmp_path / "made"))
    assert book.header()["parts"] == {"exact": 1.0, "length": 0.5} and book.rows(10).detail(0)["reckoned"].startswith("= ")
    step_file(tmp_path / "made" / "rollouts", 50, answers_of(50, 4))
    import pyarrow.parquet as pq

    file = tmp_path / "made" / "rollouts" / "step_000050.parquet"
    pq.write_table(pq.read_table(file).replace_schema_metadata({"schema_version": "2", "reward_weights": "[nonsense"}), file)
    assert Book(tmp_path / "made").header()["parts"] == {"exact": 1.0, "length": 1.0}


def test_the_weights_of_a_run_are_stored_with_its_answers(tmp_path):
    import pyarrow.parquet as pq
    import torch

    from tilt.data.rollouts import Prompt, Rollout
    from tilt.objectives import Rewards
    from tilt.runs.rollout_store import RolloutTable, write

    rollout = Rollout.demonstration(Prompt(id=0, tokens=(1,)), (2, 3))
    rewards = Rewards.of(torch.tensor([1.5]), parts={"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}, weights={"a": 0.5, "b": 0.5})
    file = write(tmp_path, 3, RolloutTable([rollout], [("p", "ab")], rewards, None, {}, {}, shown=False))
    assert json.loads(pq.read_schema(file).metadata[b"reward_weights"]) == {"a": 0.5, "b": 0.5}
    assert Rows.read(file, 3).detail(0)["reckoned"] == "= 0.5 × 1 a + 0.5 × 2 b"
