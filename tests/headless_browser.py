"""A headless Chromium, spoken to in the WebDriver protocol."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
)


class Browser:
    """One window."""

    def __init__(
        self, address: str, profile: Path, *, size: tuple[int, int] = (1280, 900), language: str = "en"
    ) -> None:
        options = {
            "binary": CHROMIUM,
            "args": [*_FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", f"--lang={language}"],
            "prefs": {"intl.accept_languages": language},
        }
        self._http = httpx.Client(base_url=address, timeout=60, trust_env=False)
        always = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": always}})["sessionId"]

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        answer = self._http.request(method, path, json=body if method == "POST" else None)
        value = answer.json()["value"]
        if answer.status_code != 200:
            raise RuntimeError(f"{path}: {value['error']}: {value['message'][:400]}")
        return value

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        return self._call(method, f"/session/{self._session}{path}", body)

    def open(self, address: str) -> None:
        self._ask("POST", "/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def type(self, selector: str, text: str) -> None:
        found = self._ask("POST", "/element", {"using": "css selector", "value": selector})[_ELEMENT]
        self._ask("POST", f"/element/{found}/value", {"text": text})

    def press(self, key: str) -> None:
        """A key, to whatever has the focus."""
        actions = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def count(self, selector: str) -> int:
        return int(self.run("return document.querySelectorAll(arguments[0]).length", selector))

    def wait(self, condition: Callable[[], Any], seconds: float = 20) -> Any:
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, f"did not come: {self.run('return document.body.innerText')[:600]}"
            time.sleep(0.05)
        return found

    def drop(self, content: bytes, name: str, kind: str) -> None:
        """Drop a file onto the page."""
        self.run(
            """
            const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
            const carried = new DataTransfer();
            carried.items.add(new File([bytes], arguments[1], { type: arguments[2] }));
            const options = { dataTransfer: carried, bubbles: true, cancelable: true };
            document.body.dispatchEvent(new DragEvent("dragenter", options));
            document.body.dispatchEvent(new DragEvent("drop", options));
            """,
            base64.b64encode(content).decode("ascii"),
            name,
            kind,
        )

    def complaints(self) -> list[str]:
        """What the console holds of warnings and errors since the last time."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def emulate(self, what: str, **options: Any) -> None:
        """Another screen or medium, by Chromium's own protocol."""
        self._ask("POST", "/goog/cdp/execute", {"cmd": f"Emulation.{what}", "params": options})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._ask("DELETE", "")
        self._http.close()


@contextlib.contextmanager
def driver() -> Iterator[str]:
    """The address of a driver that starts browsers."""
    assert DRIVER is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    process = subprocess.Popen(
        [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    address = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(trust_env=False) as client:
            for _ in range(100):
                with contextlib.suppress(httpx.HTTPError):
                    if client.get(f"{address}/status").json()["value"]["ready"]:
                        break
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(10)
