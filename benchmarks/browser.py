"""A real headless Chromium, driven over its DevTools protocol: pages, keys, screen sizes, screenshots."""

from __future__ import annotations

import asyncio
import base64
import re
import shutil
import subprocess
import time

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_CODES = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Backspace": 8, "Tab": 9, " ": 32}


class Browser:
    """`with Browser(folder) as browser:`; `folder` is its profile."""

    def __init__(self, folder):
        flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --mute-audio"
        self.process = subprocess.Popen(
            [CHROMIUM, *flags.split(), "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        found = None
        while not found:
            line = self.process.stderr.readline()
            assert line, "Chromium ended before it listened"
            found = re.search(r"DevTools listening on (ws://\S+)", line)
        self.loop, self.number, self.events = asyncio.new_event_loop(), 0, []
        self.loop.run_until_complete(self._connect(found.group(1)))

    async def _connect(self, url):
        self.http = aiohttp.ClientSession()
        self.socket = await self.http.ws_connect(url, max_msg_size=0)

    def call(self, method, session=None, **params):
        return self.loop.run_until_complete(asyncio.wait_for(self._call(method, session, params), 60))

    async def _call(self, method, session, params):
        self.number += 1
        number = self.number
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        await self.socket.send_json(message)
        while True:
            reply = await self.socket.receive_json()
            if reply.get("id") == number:
                assert "error" not in reply, (method, reply["error"])
                return reply["result"]
            self.events.append(reply)

    def open(self, url, width=1280, height=800, dark=False):
        return Page(self, url, width, height, dark)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.loop.run_until_complete(self.http.close())
        self.loop.close()
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()


class Page:
    def __init__(self, browser, url, width, height, dark):
        self.browser = browser
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def value(self, expression):
        """Of a JavaScript expression; a promise is awaited."""
        reply = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def wait(self, expression, seconds=40):
        """Until the expression is true; returns it."""
        end = time.monotonic() + seconds
        while not (value := self.value(expression)):
            assert time.monotonic() < end, f"{expression} did not come: {self.value('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def key(self, key):
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = _CODES.get(key, ord(key.upper()[0]))
        event = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def screenshot(self):
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def problems(self):
        """Exceptions of the page's script."""
        return [e for e in self.browser.events if e.get("method") == "Runtime.exceptionThrown"]

    def addresses(self):
        """Everything that was asked for so far."""
        events = [e for e in self.browser.events if e.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in events]

    def close(self):
        self.browser.call("Target.closeTarget", targetId=self.target)
