"""Draws results/frames.png: what the sets look like, plain, at the three levels of distraction, with other bodies.

python data/frames.py"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT), str(ROOT / "data")]
from collectors import SACPolicy, policy_file  # noqa: E402

from common import make_env  # noqa: E402
from variations import SCALES, TASKS, Look  # noqa: E402

SIZE, STEPS = 84, 60  # pixels per side, shown twice as large; of the shipped expert, from the same first state


def main() -> None:
    columns = [("plain", None, None), *((level, Look(level, "train", 0), None) for level in SCALES)]
    columns += [(f"body {body}", None, body) for body in "ADH"]
    pitch = 2 * SIZE + 4
    sheet = Image.new("RGB", (pitch * len(columns) - 4, pitch * len(TASKS) - 4), "white")
    for y, task in enumerate(TASKS):
        policy = SACPolicy(policy_file(task, "expert"))
        for x, (name, look, body) in enumerate(columns):
            env = make_env(task, SIZE, 1, body=body)
            frame, info = env.reset(0, look)
            for _ in range(STEPS):
                frame, *_, info = env.step(policy.act(info["state"], None))
            picture = Image.fromarray(frame.transpose(1, 2, 0)).resize((2 * SIZE, 2 * SIZE), 0)
            ImageDraw.Draw(picture).text((4, 2), name, fill="white", stroke_width=1, stroke_fill="black")
            sheet.paste(picture, (pitch * x, pitch * y))
    sheet.save(ROOT / "results" / "frames.png", optimize=True)


if __name__ == "__main__":
    main()
