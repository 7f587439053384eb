"""Put a language and a domain together, turn the dial, and see what it does to Chinese queries.

    python examples/compose.py runs/quickstart/language-zh runs/quickstart/domain --image shirt.png 一件衬衫 一条裙子

Any adapted folders of one base will do, one of each link.
"""

from __future__ import annotations

import argparse

import trimtab
from trimtab.adapters.adapted import load


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, help="adapted folders: a language and a domain")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--base", default="starter")
    parser.add_argument("--image", required=True)
    chosen = parser.parse_args(arguments)

    model = load(chosen.base, links=chosen.folders)
    print(f"{' and '.join(model.links)} on {trimtab.DualEncoder.__name__} {model.base.name}")
    texts = model.encode_text(chosen.texts)
    for alpha in (0.0, 0.5, 1.0):
        model.alpha = alpha  # 0: pictures as the base sees them; 1: as the domain was taught
        cosines = model.encode_image(chosen.image) @ texts.T
        best = chosen.texts[int(cosines.argmax())]
        print(f"alpha {alpha}: {best}, {', '.join(f'{one:.3f}' for one in cosines[0])}")


if __name__ == "__main__":
    main()
