"""Headless Chromium over its DevTools protocol: what the test of the site and the screenshots share."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websocket import WebSocket, create_connection

PHONE = 390
"""CSS pixels across a phone."""

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    # What a browser asks other hosts for by itself is not the site's doing.
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--remote-debugging-port=0",  # any that is free
    "--remote-allow-origins=*",
)


def find_chromium() -> str | None:
    """Where Chromium is, if it is installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
"""What a test presses, by the codes that Chromium wants beside the names."""


class Page:
    """One tab. Every request it makes is kept in ``requests``, what goes wrong in it in ``errors``."""

    def __init__(self, socket: WebSocket) -> None:
        self.socket = socket
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.downloads: list[str] = []
        self._last_id = 0
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Network.setCacheDisabled", cacheDisabled=True)  # a page loads what it needs, whatever came before

    def _receive(self) -> dict[str, Any]:
        message = json.loads(self.socket.recv())
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(f"{params['entry'].get('url', '')}: {params['entry']['text']}")
            case "Runtime.exceptionThrown":
                self.errors.append(str(params["exceptionDetails"].get("exception", {}).get("description")))
            case "Page.downloadWillBegin" | "Browser.downloadWillBegin":
                self.downloads.append(params["suggestedFilename"])
        return message

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Asks Chromium for something and gives back its answer."""
        self._last_id += 1
        self.socket.send(json.dumps({"id": self._last_id, "method": method, "params": params}))
        while (message := self._receive()).get("id") != self._last_id:
            pass
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']['message']}")
        return message["result"]

    def open(self, address: Path | str, settle: bool = True) -> None:
        """Loads a file or an address, and waits until it stands still: scripts run, formulas set, fonts there."""
        self.call("Page.navigate", url=address if isinstance(address, str) else address.resolve().as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass
        if not settle:
            return
        self.evaluate(
            """(async () => {
                if (window.MathJax?.startup) await MathJax.startup.promise;
                await document.fonts.ready;
                await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
            })()"""
        )

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def press(self, key: str, shift: bool = False) -> None:
        """Presses one of `KEYS` and lets it go; the page has then done what it does."""
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 if shift else 0}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)
        self.evaluate("new Promise(done => setTimeout(() => requestAnimationFrame(done)))")

    def set_width(self, width: int, height: int = 900) -> None:
        """Makes the page as wide as a device."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width <= PHONE
        )

    def set_dark(self, dark: bool, paper: bool = False) -> None:
        """Asks for the dark or the light colours, as the reader's system would, on a screen or on ``paper``."""
        features = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        self.call(
            "Emulation.setEmulatedMedia",
            media="print" if paper else "screen",
            features=[{"name": n, "value": v} for n, v in features.items()],
        )


@contextlib.contextmanager
def chromium_page(binary: str) -> Iterator[Page]:
    """A tab of a new Chromium with a profile of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [binary, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stderr is not None
            # Chromium says where it listens: "DevTools listening on ws://127.0.0.1:PORT/…".
            address = next((line.split("//")[1] for line in process.stderr if "listening on ws://" in line), None)
            if address is None:
                raise RuntimeError(f"{binary} ended before it could be asked anything")
            threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
            with urllib.request.urlopen(f"http://{address.split('/')[0]}/json/list") as answer:
                tab = next(target for target in json.load(answer) if target["type"] == "page")
            with contextlib.closing(create_connection(tab["webSocketDebuggerUrl"], timeout=60)) as socket:
                yield Page(socket)
        finally:
            process.terminate()
            process.wait(timeout=30)
