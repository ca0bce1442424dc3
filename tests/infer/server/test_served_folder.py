"""The folder of a server: only one process uses it, and other users cannot read its files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from longvideo.errors import UserError
from longvideo.files import BusyError
from longvideo.infer.server.served_folder import served_folder
from tests.infer.server.conftest import PROMPT, Serve, wait_until


def modes(folder: Path) -> set[int]:
    """Return the permissions of the files and folders that other users can access."""
    allowed = {True: 0o700, False: 0o600}
    permissions = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}
    return {mode for path, mode in permissions.items() if mode != allowed[path.is_dir()]}


def test_a_folder_is_unlocked_after_its_process(tmp_path: Path) -> None:
    for _ in range(2):
        busy = pytest.raises(BusyError, match="another process serves")
        with served_folder(tmp_path / "new" / "served"), busy, served_folder(tmp_path / "new" / "served"):
            pass
    assert [path.name for path in (tmp_path / "new" / "served").iterdir() if path.is_file()] == []


def test_only_the_user_can_read_served_files(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    server = serve(folder=folder)
    client = server.connect()
    client.start()
    client.receive_until("chunk", chunk=1)
    with server.http() as http:
        job = http.post("/v1/videos", json={"prompt": PROMPT, "seconds": 0.1}).json()["id"]
        wait_until(lambda: http.get(f"/v1/videos/{job}").json()["status"] == "completed")
        assert modes(folder) == set()
    client.socket.close()
    wait_until(lambda: server.streams.num_live == 0)
    assert {path.suffix for path in (folder / "streams").iterdir()} == {".mp4", ".json", ".safetensors"}
    assert modes(folder) == set()


def test_existing_files_of_the_server_become_private_and_other_files_do_not_change(tmp_path: Path) -> None:
    folder, mixed = tmp_path / "served", tmp_path / "mixed"
    outside = tmp_path / "outside"
    outside.write_text("")
    for path in (folder, mixed):
        for name in ("streams", "videos"):
            (path / name).mkdir(parents=True, mode=0o755)
        for name in ("jobs.sqlite", "jobs.sqlite-wal", "streams/a.mp4", "streams/a.json", "videos/b.mp4"):
            (path / name).write_bytes(b"x")
            (path / name).chmod(0o644)
    (folder / "videos" / "link.mp4").symlink_to(outside)
    (mixed / "notes.txt").write_text("")
    (mixed / "notes.txt").chmod(0o644)
    mixed.chmod(0o755)
    mask = os.umask(0o022)
    os.umask(mask)
    for path in (folder, mixed):
        with served_folder(path):
            (path / "videos" / "new.mp4").write_bytes(b"")
    (folder / "videos" / "link.mp4").unlink()
    assert modes(folder) == set()
    assert modes(mixed) == {0o755, 0o644}
    assert {stat.S_IMODE(path.stat().st_mode) for path in mixed.rglob("*.mp4")} == {0o600}
    assert stat.S_IMODE(outside.stat().st_mode) == 0o644
    assert os.umask(mask) == mask


@pytest.mark.parametrize("name", ["file", "file/inside"])
def test_an_impossible_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use the folder"), served_folder(tmp_path / name):
        pass
