"""`push` and `pull` against a stand-in for the Hub that speaks as much of its protocol as a small folder needs."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading

import pytest

from tests.runs import ROOT

COMMIT = "0" * 39 + "1"


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, whose files come with commits and are kept in `self.server.files`."""

    def log_message(self, *arguments):
        pass

    def answer(self, body, status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer right":
            self.answer({"error": "who are you?"}, 401)
        elif self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self.answer({"url": f"http://{self.headers['Host']}/me/model", "name": "me/model"})
        elif self.path.startswith("/api/models/me/model/preupload/main"):
            files = [dict(path=file["path"], uploadMode="regular", shouldIgnore=False) for file in json.loads(body)["files"]]
            self.answer({"files": files})
        elif self.path.startswith("/api/models/me/model/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            where = f"http://{self.headers['Host']}/me/model/commit/{COMMIT}"
            self.answer({"commitUrl": where, "commitOid": COMMIT, "success": True})
        else:
            self.answer({"error": self.path}, 404)

    def do_GET(self):
        files, path = self.server.files, self.path.partition("?")[0]
        found = re.fullmatch(f"/me/model/resolve/(?:main|{COMMIT})/(.*)", path)
        if re.fullmatch(f"/api/models/me/model(/revision/(main|{COMMIT}))?", path):
            siblings = [dict(rfilename=name) for name in files]
            self.answer({"id": "me/model", "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0, "likes": 0})
        elif path.startswith("/api/models/me/model/tree/"):
            self.answer([dict(type="file", path=name, size=len(text), oid="1") for name, text in files.items()])
        elif found and found[1] in files:
            text = files[found[1]]
            self.answer(text, ETag=f'"{hashlib.sha256(text).hexdigest()}"')
        else:
            self.answer({"error": "no such thing"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub():
    pytest.importorskip("huggingface_hub", reason="pip install 'maskvit[hub]'")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.made = {}, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(hub, home, *words, token="right"):
    """A child process, as the library reads where the Hub is when it is imported."""
    where = f"http://127.0.0.1:{hub.server_address[1]}"
    environment = dict(os.environ, HF_ENDPOINT=where, HF_TOKEN=token, HF_HOME=str(home), HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "maskvit", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_there_and_back(hub, tmp_path):
    """All files but hidden ones, also those in folders; the same bytes come back."""
    (tmp_path / "model" / "0").mkdir(parents=True)
    (tmp_path / "model" / ".cache").mkdir()
    written = {"config.json": b"{}", "0/weights.bin": bytes(range(256))}
    for name, content in {**written, ".cache/x": b"no", ".hidden": b"no"}.items():
        (tmp_path / "model" / name).write_bytes(content)
    pushed = run(hub, tmp_path / "home", "push", "--folder", str(tmp_path / "model"), "--repo", "me/model", "--private")
    assert pushed.returncode == 0, pushed.stderr
    assert "2 files (0.0 MiB) written to me/model: " in pushed.stdout and hub.files == written
    assert hub.made[0]["name"] == "model" and "private" in json.dumps(hub.made[0])
    pulled = run(hub, tmp_path / "home", "pull", "--repo", "me/model", "--dst", str(tmp_path / "back"))
    assert pulled.returncode == 0, pulled.stderr
    assert "2 files of me/model written to" in pulled.stdout
    assert {name: (tmp_path / "back" / name).read_bytes() for name in written} == written


def test_what_the_hub_refuses_is_one_line(hub, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.txt").write_text("a")
    pushed = run(hub, tmp_path / "home", "push", "--folder", str(tmp_path / "model"), "--repo", "me/model", token="wrong")
    pulled = run(hub, tmp_path / "home", "pull", "--repo", "me/other", "--dst", str(tmp_path / "back"))
    for ended, repo, said in ((pushed, "me/model", "401"), (pulled, "me/other", "404")):
        lines = ended.stderr.strip().splitlines()
        assert ended.returncode == 2 and lines[-1].startswith(f"error: --repo is '{repo}': ") and said in lines[-1], ended.stderr
        assert "Traceback" not in ended.stderr
    assert hub.files == {}


def test_without_the_library(tmp_path, monkeypatch, capsys):
    from maskvit.commands import push

    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert push.main(["--folder", str(tmp_path), "--repo", "me/model"]) == 2
    assert "pip install 'maskvit[hub]'" in capsys.readouterr().err
