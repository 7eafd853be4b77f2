"""A headless Chromium, controlled by its debugging protocol."""

import asyncio
import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

PATIENCE = 180.0  # seconds; a machine may be busy


class Tab:
    """A tab. `requested`: the addresses that its pages have requested."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self.socket, self.requested = socket, []
        self._calls = 0
        self._answers: dict[int, asyncio.Future] = {}  # by the number of the call
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self.socket:
            told = message.json()
            if told.get("method") == "Network.requestWillBeSent":
                self.requested.append(told["params"]["request"]["url"])
            elif "id" in told:
                self._answers.pop(told["id"]).set_result(told)

    async def call(self, method: str, **given) -> dict:
        """Run a command of the protocol. Raises RuntimeError if it fails."""
        self._calls = number = self._calls + 1
        self._answers[number] = answer = asyncio.get_running_loop().create_future()
        await self.socket.send_json({"id": number, "method": method, "params": given})
        told = await asyncio.wait_for(answer, PATIENCE)
        if "error" in told:
            raise RuntimeError(f"{method}: {told['error']}")
        return told["result"]

    async def run(self, script: str):
        """The value of a JavaScript expression."""
        told = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in told:
            raise RuntimeError(f"{script}: {json.dumps(told['exceptionDetails'])}")
        return told["result"].get("value")

    async def until(self, script: str):
        """Wait until an expression is true. Returns its value; TimeoutError."""
        deadline = time.monotonic() + PATIENCE
        while not (value := await self.run(script)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true: {script}")
            await asyncio.sleep(0.1)
        return value

    async def click(self, selector: str) -> None:
        """A click with the mouse in the middle of an element, once it is there and stands still."""
        x, y = await self.until(
            f"""(async () => {{
                const element = document.querySelector({json.dumps(selector)});
                if (element === null) return null;
                const middle = (box) => [box.x + box.width / 2, box.y + box.height / 2];
                element.scrollIntoView({{block: "center", behavior: "instant"}});
                const before = middle(element.getBoundingClientRect());
                await new Promise((done) => setTimeout(done, 100));
                const now = middle(element.getBoundingClientRect());
                return element.isConnected && before.join() === now.join() && now;
            }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def type(self, selector: str, text: str) -> None:
        """Replace the text of a field by typing."""
        await self.click(selector)
        await self.run(f"document.querySelector({json.dumps(selector)}).select()")
        await self.call("Input.insertText", text=text)

    async def screenshot(self, path: Path) -> None:
        """A screenshot of the tab, as a PNG."""
        path.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot"))["data"]))


def chromium() -> str | None:
    """Path of the Chromium program, None if there is none."""
    return shutil.which("chromium")


@asynccontextmanager
async def tab(url: str, width: int = 1400, height: int = 1100):
    """A tab of a new Chromium that shows this page."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        argv = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        argv += [f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"]
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            port = next(m[1] for line in process.stderr if (m := re.search(r"listening on ws://[^:]+:(\d+)/", line)))
            async with aiohttp.ClientSession() as session:
                deadline, targets = time.monotonic() + PATIENCE, []
                while not targets and time.monotonic() < deadline:  # it listens before it has a page
                    async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                        targets = [page for page in await answer.json() if page["type"] == "page"]
                [target] = targets
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    shown = Tab(socket)
                    for domain in ("Page", "Network", "Runtime"):
                        await shown.call(f"{domain}.enable")
                    await shown.call("Page.navigate", url=url)
                    yield shown
        finally:
            process.terminate()
            process.wait(PATIENCE)
