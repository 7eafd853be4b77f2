"""The page of an evaluation: best and worst pictures beside the real ones, and the scores."""

import base64
import html
import io

from PIL import Image
from torch import Tensor

from tinyflux.util.pixels import to_uint8

SHOWN = 12  # number of best and of worst pictures on a page


def png(picture: Tensor) -> str:
    """A picture [3, H, W] in [-1, 1] as a PNG in base64."""
    data = io.BytesIO()
    Image.fromarray(to_uint8(picture).permute(1, 2, 0).numpy()).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def page(about: dict, cells: list[tuple[str, str, str, str]]) -> str:
    """HTML with the best and the worst pictures beside the real ones. cells: prompt, picture, real one, score."""

    def figures(some) -> str:
        return "".join(
            f'<figure><img src="data:image/png;base64,{mine}" alt="drawn"><img src="data:image/png;base64,{real}"'
            f' alt="real"><figcaption>{html.escape(prompt[:200])}<br><b>{score}</b></figcaption></figure>'
            for prompt, mine, real, score in some
        )

    def shown(value) -> str:
        if isinstance(value, list):
            return ", ".join(value)
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(shown(value))}</td></tr>"
        for key, value in about.items()
        if key != "loss_by_t"
    )
    most = max(about["loss_by_t"].values())
    bars = "".join(
        f'<tr><td>{t}</td><td>{value:.4f}</td><td><div style="width:{200 * value / most:.0f}px"></div></td></tr>'
        for t, value in about["loss_by_t"].items()
    )
    n = min(SHOWN, -(-len(cells) // 2))
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>TinyFlux evaluation</title><style>
body {{ font: 15px system-ui, sans-serif; margin: 2em auto; max-width: 1130px; color: #222; padding: 0 1em }}
main {{ display: flex; flex-wrap: wrap; gap: 1em }} figure {{ margin: 0; width: 268px }}
figure img {{ width: 128px; height: auto; image-rendering: pixelated; margin-right: 4px }}
figcaption {{ font-size: 13px; overflow-wrap: anywhere }} td {{ padding: 0 1em 0 0 }}
td div {{ background: #58a; height: 10px }}
</style>
<h1>Evaluation</h1><p>Each pair: the drawn picture on the left, the sample's real picture on the right.</p>
<h2>Best</h2><main>{figures(cells[:n])}</main><h2>Worst</h2><main>{figures(cells[::-1][:n])}</main>
<h2>Scores</h2><table>{rows}</table><h2>Loss by t</h2><table>{bars}</table></html>
"""
