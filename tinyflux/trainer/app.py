"""The browser page to draw with: a form, a gallery, and the checkpoints of a run side by side.

torch is imported when something is drawn, gradio when the page is built.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tinyflux.trainer.drawing import Artist
from tinyflux.trainer.solvers import SOLVERS
from tinyflux.util.settings import AtLeast, Within, check

if TYPE_CHECKING:
    import gradio

KEPT = 4
"""Checkpoints to keep in memory."""
WAITING = 16
"""Requests that may wait in the queue."""
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'"
"""The browser loads nothing from other hosts, whatever the page's libraries request."""


@dataclass
class AppOptions:
    checkpoint: str
    """A run folder, whose checkpoints can be compared; or a .safetensors or .pt file, or user/repo[:sub/folder]."""
    zoo: str | None = None
    """Encoders and decoder: flux, tiny, or a folder. Default: the zoo in the run's training_config.json, else flux."""
    host: str = "127.0.0.1"
    """The address to listen on. There is no login: for access from another machine, use an SSH tunnel."""
    port: Annotated[int, Within(1, 65535)] = 7860
    """The port to listen on."""
    out: Path | None = None
    """Folder to keep the pictures in. Default: they are deleted when the page is closed."""
    batch_size: Annotated[int, AtLeast(1)] = 8
    """Pictures to draw at once."""

    def __post_init__(self):
        check(self, "--")


def weights_of(checkpoint: str) -> dict[str, tuple[str, bool]]:
    """The weights in a checkpoint: label -> (path, averaged?), newest first.

    For a run: the trained and the averaged weights of each step, and the best ones.
    """
    from tinyflux.model.dcp import METADATA, step_of

    folder = Path(checkpoint)
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    found: dict[tuple[int, bool], str] = {}
    for path in sorted(folder.glob("*")) if folder.is_dir() else ():
        if name := re.fullmatch(r"(?:step_(\d+)|best)(_ema)?\.safetensors", path.name):
            found[int(name[1]) if name[1] else -1, bool(name[2])] = str(path)
        elif (step := step_of(path)) >= 0 and (path / METADATA).is_file():
            for averaged in (True, False):  # exported weights load faster, so they come first
                found.setdefault((step, averaged), str(path))
    if not found:
        return {"averaged": (checkpoint, True), "trained": (checkpoint, False)}
    return {
        f"{f'step {step}' if step >= 0 else 'best'}, {'averaged' if averaged else 'trained'}": (
            found[step, averaged],
            averaged,
        )
        for step, averaged in sorted(found, reverse=True)
    }


def read_settings(path: str | Path) -> dict:
    """The settings stored in a PNG by `sample` or by this page. Raises ValueError if there are none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            found = json.loads(getattr(image, "text", {})["parameters"])
        return {**found, "prompts": list(map(str, found["prompts"])), "seed": int(found["seed"])}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{Path(path).name} has no settings: open a PNG drawn here or by `sample`") from error


class Page:
    """The page's actions; `blocks` builds its user interface."""

    def __init__(self, options: AppOptions, folder: Path):
        self.options, self.folder, self.drawn = options, folder, 0
        self.first = Artist.load(options.checkpoint, zoo=options.zoo)
        self.load = lru_cache(KEPT)(self._load)

    def _load(self, path: str, averaged: bool, _changed: float) -> Artist:
        return self.first.other(path, averaged)

    def artist(self, name: str) -> Artist:
        """The weights with this label. Raises ValueError if they no longer exist."""
        known = weights_of(self.options.checkpoint)
        if name not in known:
            raise ValueError(f"{name}: these weights no longer exist; choose one of {', '.join(known)}")
        path, averaged = known[name]
        return self.load(path, averaged, os.stat(path).st_mtime if Path(path).exists() else 0.0)

    def draw(self, form: dict, on_step) -> Iterator[tuple[list[tuple[str, str]], list[str], int]]:
        """Draw what the form asks for: one row per picture, one column per checkpoint.

        Yields after each batch: the pictures so far as (path, caption), warnings about what training never saw, and the
        number of columns. on_step(done, all) is called after each step. Raises ValueError.
        """
        from tinyflux.trainer.sampling import save_samples

        prompts = [line.strip() for line in form["prompts"].splitlines() if line.strip()]
        if not prompts or not form["weights"]:
            raise ValueError("give at least one prompt and one checkpoint")
        prompts = [prompt for prompt in prompts for _ in range(int(form["count"]))]
        size, seed, first = self.options.batch_size, int(form["seed"]), int(form["first"])
        found: dict[tuple[int, int], tuple[str, str]] = {}
        batches, done, doubts = -(-len(prompts) // size) * len(form["weights"]), 0, []
        for column, name in enumerate(form["weights"]):
            artist = self.artist(name)
            sampler = artist.sampler(
                int(form["height"]),
                int(form["width"]),
                batch_size=size,
                guidance=form["guidance"],
                shift=form["shift"],
                steps=int(form["steps"]),
                solver=form["solver"],
                guidance_interval=(form["interval_from"], form["interval_to"]),
                guidance_rescale=form["rescale"],
            )
            doubts = artist.doubts(prompts, int(form["height"]), int(form["width"]))
            settings = artist.parameters(sampler, negative_prompt=form["negative"], seed=seed)
            steps = len(sampler.settings.schedule()) - 1
            for start in range(0, len(prompts), size):
                texts = prompts[start : start + size]

                def after_step(step: int, t: float, latents, before: int = done, every: int = batches * steps):
                    on_step(before + step + 1, every)
                    return latents

                images = sampler(artist.model, texts, negative=form["negative"], seed=seed, first=first + start,
                                 on_step=after_step)  # fmt: skip
                done += steps
                for row, (text, image) in enumerate(zip(texts, images, strict=True), start):
                    self.drawn += 1
                    kept = {"prompts": [text], "picture": first + row, **settings}
                    path = save_samples(image[None], self.folder / f"{self.drawn:05d}.png", parameters=kept)
                    words = [text, name] if len(form["weights"]) == 1 else [name, text]
                    found[row, column] = (str(path), " · ".join([*words, caption(kept)]))
                yield [found[place] for place in sorted(found)], doubts, len(form["weights"])


def caption(kept: dict) -> str:
    """The settings of a picture in one line."""
    return (
        f"seed {kept['seed']}, picture {kept['picture']} · {kept['solver']}, {kept['steps']} steps"
        f" · guidance {kept['guidance']:g}"
    )


def free_name(folder: Path) -> int:
    """The highest number of the pictures in a folder."""
    return max((int(path.stem) for path in folder.glob("*.png") if path.stem.isdigit()), default=0)


class Headers:
    """ASGI middleware that sends `POLICY` with each response."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        """Forward the request."""

        async def sent(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, sent if scope["type"] == "http" else send)


def blocks(page: Page) -> "gradio.Blocks":
    """The page's user interface."""
    import gradio as gr

    usual, (height, width) = page.first.recorded, page.first.size()
    names = list(weights_of(page.options.checkpoint))
    with gr.Blocks(title=f"TinyFlux: {page.first.checkpoint}", analytics_enabled=False) as made:
        gr.Markdown(f"## {page.first.checkpoint}")
        shown = gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                form = {
                    "prompts": gr.Textbox(label="Prompts, one per line", lines=4, elem_id="prompts"),
                    "negative": gr.Textbox(label="Negative prompt"),
                    "weights": gr.Dropdown(names, value=names[:1], multiselect=True, label="Checkpoints, side by side"),
                }
                with gr.Row():
                    draw, stop = gr.Button("Draw", variant="primary", elem_id="draw"), gr.Button("Stop")
                with gr.Row():
                    form["count"] = gr.Number(1, label="Pictures per prompt", precision=0, minimum=1, maximum=64)
                    form["seed"] = gr.Number(0, label="Seed", precision=0, elem_id="seed")
                    form["first"] = gr.Number(0, label="Number of the first picture", precision=0, minimum=0)
                with gr.Row():
                    form["steps"] = gr.Slider(1, 100, 28, step=1, label="Steps")
                    form["solver"] = gr.Dropdown(list(SOLVERS), value="euler", label="Solver")
                with gr.Row():
                    form["guidance"] = gr.Slider(1, 15, usual.guidance, step=0.1, label="Guidance")
                    form["rescale"] = gr.Slider(0, 1, 0, step=0.05, label="Guidance rescale")
                with gr.Row():
                    form["interval_from"] = gr.Slider(0, 1, 0, step=0.01, label="Guidance from t")
                    form["interval_to"] = gr.Slider(0, 1, 1, step=0.01, label="to t (0 is noise)")
                with gr.Row():
                    form["height"] = gr.Number(height, label="Height", precision=0, minimum=1)
                    form["width"] = gr.Number(width, label="Width", precision=0, minimum=1)
                    form["shift"] = gr.Number(usual.shift, label="Shift")
            with gr.Column(scale=3, min_width=420):
                gallery = gr.Gallery(
                    label="Pictures", height=640, format="png", object_fit="contain", interactive=False,
                    elem_id="pictures", buttons=["download", "fullscreen"],
                )  # fmt: skip
                notes = gr.Markdown(elem_id="notes")
                with gr.Row():
                    back = gr.Button("Put the selected picture into the form", elem_id="back")
                    upload = gr.UploadButton("Open a PNG", file_types=[".png"])
        chosen = gr.State(0)

        def run(*values, progress=gr.Progress()):  # noqa: B008 - gradio finds it by this default
            def on_step(done: int, steps: int) -> None:
                progress((done, steps), desc="drawing", unit="steps")

            try:
                for pictures, doubts, columns in page.draw(dict(zip(form, values, strict=True)), on_step):
                    told = "  \n".join(doubts)
                    yield gr.Gallery(pictures, columns=columns if columns > 1 else 3), told, pictures, 0
            except (ValueError, OSError) as error:
                raise gr.Error(str(error), print_exception=False) from error

        def filled(path: str) -> list:
            """Form values from a picture's file."""
            try:
                kept = read_settings(path)
            except ValueError as error:
                raise gr.Error(str(error), print_exception=False) from error
            names, values = weights_of(page.options.checkpoint), dict.fromkeys(form, gr.skip())
            values |= {key: kept[key] for key in form.keys() & kept.keys()}
            values |= {"prompts": "\n".join(kept["prompts"]), "count": 1, "first": kept.get("picture", 0)}
            values |= {"negative": kept.get("negative_prompt", ""), "rescale": kept.get("guidance_rescale", 0)}
            if interval := kept.get("guidance_interval"):
                values |= dict(zip(("interval_from", "interval_to"), interval, strict=True))
            same = [name for name, (path, _) in names.items() if Path(path).name == kept.get("weights")]
            values["weights"] = same or gr.skip()
            return list(values.values())

        def put_back(pictures: list, index: int) -> list:
            if not pictures:
                raise gr.Error("draw a picture first", print_exception=False)
            return filled(pictures[min(index, len(pictures) - 1)][0])

        def select(event: gr.SelectData) -> int:
            return event.index

        def refreshed(chosen: list[str]):
            names = list(weights_of(page.options.checkpoint))
            return gr.Dropdown(names, value=[name for name in chosen or names[:1] if name in names])

        inputs = list(form.values())
        drawing = draw.click(
            run, inputs, [gallery, notes, shown, chosen], show_progress_on=gallery, api_visibility="private"
        )
        stopped = stop.click(None, cancels=[drawing], api_visibility="private")
        # gradio 6.31 covers the outputs of what was cancelled with "Error", until they are set again
        stopped.then(lambda pictures: pictures, shown, gallery, queue=False, api_visibility="private")
        gallery.select(select, None, chosen, queue=False, api_visibility="private")
        # in the queue, or an error is not shown; with progress shown, it would cover the whole form
        back.click(put_back, [shown, chosen], inputs, show_progress="hidden", api_visibility="private")
        upload.upload(filled, upload, inputs, show_progress="hidden", api_visibility="private")
        form["weights"].focus(refreshed, form["weights"], form["weights"], queue=False, api_visibility="private")
    return made.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)


def serve(options: AppOptions, folder: Path) -> tuple["gradio.Blocks", str]:
    """Start the page in threads. Returns the page, for closing it, and its URL. Raises OSError if the port is taken."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it on import
    os.environ["GRADIO_TEMP_DIR"] = str(folder / ".served")
    import gradio as gr
    from starlette.middleware import Middleware

    page = Page(options, folder)
    page.drawn = free_name(folder)
    made = blocks(page)
    _, url, _ = made.launch(
        server_name=options.host,
        server_port=options.port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        ssr_mode=False,
        allowed_paths=[str(folder)],
        css="#pictures .caption { white-space: normal; text-align: center }",
        app_kwargs={"middleware": [Middleware(Headers)]},
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    return made, url


def app(options: AppOptions) -> None:
    """Serve the page until Ctrl-C. Raises ValueError without gradio, else as `Artist.load` and `serve`."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError("the page needs gradio: pip install 'tinyflux-deep[app]'") from error
    with tempfile.TemporaryDirectory(prefix="tinyflux-") as temporary:
        folder = Path(options.out or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        made, url = serve(options, folder)
        print(f"open {url} to draw (Ctrl-C to stop); pictures are saved in {folder}", flush=True)
        made.block_thread()
