"""Writes what bench/measure.py has found into the two READMEs, and collects pictures in assets/.

    python bench/report.py

README.md gets a table of the most important columns, bench/README.md one of all, between the lines
START and END. The tables show all that is in bench/results.json. assets/ gets samples.png, a row of
samples of each model, and those pictures of the runs that README.md shows. Pictures of runs that
are not in out/ stay as they are. bench/figures.py draws the charts.
"""

import math
import shutil
import sys
from pathlib import Path

from measure import GREY, kind_of, read_results
from PIL import Image, ImageDraw
from train_all import SCRIPTS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from common import load_mnist, save_images

START = "<!-- bench/report.py writes from here -->\n"
END = "<!-- to here -->\n"
PAPERS = {  # with their arXiv numbers
    "made": ("Germain 2015", "1502.03509"),
    "pixelcnn": ("van den Oord 2016", "1601.06759"),
    "gatedcnn": ("van den Oord 2016", "1606.05328"),
    "rnn": ("van den Oord 2016", "1601.06759"),
    "wavenet": ("van den Oord 2016", "1609.03499"),
    "transformer": ("Vaswani 2017", "1706.03762"),
    "vae": ("Kingma 2013", "1312.6114"),
    "vqvae": ("van den Oord 2017", "1711.00937"),
    "gan": ("Goodfellow 2014", "1406.2661"),
    "diffusion": ("Ho 2020", "2006.11239"),
}
LESSONS = {  # what to learn from a script
    "made": "the chain rule; masks that make one pass predict 784 pixels",
    "pixelcnn": "masked convolutions; receptive field and blind spot",
    "gatedcnn": "two stacks, no blind spot; gates; dilation",
    "rnn": "a memory of fixed size: the LSTM",
    "wavenet": "a reach that doubles with each layer; queues",
    "transformer": "attention to all of the past; keys and values",
    "vae": "latent codes; a bound on p(x); gradients through noise",
    "vqvae": "a codebook; gradients past an argmin; a learned prior",
    "gan": "learning from an opponent; why its losses do not fall",
    "diffusion": "removing noise in steps; guidance by labels",
}
# what a script knows of p(x), and passes of its network per sample; the others are autoregressive
P_OF_X = {"vae": "a bound", "vqvae": "a bound", "gan": "-", "diffusion": "-"}
PASSES = {"vae": "1", "vqvae": "49 small + 1", "gan": "1", "diffusion": "50"}
FORMATS = {  # of all columns
    "file": "{}",
    "paper": "{}",
    "what to learn from it": "{}",
    "p(x)": "{}",
    "passes": "{}",
    "model": "{}",
    "parameters": "{:,}",
    "minutes": "{:.0f}",
    "epochs": "{}",
    "s/epoch": "{:.0f}",
    "nats": "{:.2f}",
    "-ELBO": "{:.2f}",
    "bits/dim": "{:.4f}",
    "100 in": "{:.2f} s",
    "Fréchet": "{:.2f}",
    "ratio": "{:.0f}",
    "KID": "{:.1f}",
    "precision": "{:.2f}",
    "recall": "{:.2f}",
    "brightness": "{:.3f}",
    "digits": "{0[0]:.0f}-{0[1]:.0f} %",
    "labels": "{:.1f} %",
}
SHORT = "file,paper,what to learn from it,p(x),passes,parameters,minutes,nats,ratio".split(",")
LONG = [column for column in FORMATS if column not in (*SHORT[:5], "minutes")]
BINARISED = [script for script in SCRIPTS if script not in GREY]
# Columns in which the lowest number is bold, and the models among which it is. Distances from grey
# digits and from binarised ones do not compare.
RACES = [
    ("nats", SCRIPTS),
    ("s/epoch", SCRIPTS),
    ("100 in", SCRIPTS),
    ("ratio", GREY),
    ("ratio", BINARISED),
]


# ---------------------------------------------------------------- tables
def row_of(name, figures, real):
    """{column: value} of a line; real: the Fréchet distance of training images."""
    row = {column: figures[column] for column in FORMATS if column in figures}
    row["model"] = name
    row["file"] = name
    if name in SCRIPTS:
        row["model"] = f"{name}.py"
        row["file"] = f"[{name}.py]({name}.py)"
        paper, number = PAPERS[name]
        row["paper"] = f"[{paper}](https://arxiv.org/abs/{number})"
        row["what to learn from it"] = LESSONS[name]
        row["p(x)"] = P_OF_X.get(name, "exact")
        row["passes"] = PASSES.get(name, "784 small")
    if "s/epoch" in figures:
        row["minutes"] = figures["epochs"] * figures["s/epoch"] / 60
    row["Fréchet"] = figures["Frechet"]
    row["ratio"] = figures["Frechet"] / real
    row["digits"] = (100 * figures["rarest"], 100 * figures["commonest"])
    if "labels" in figures:
        row["labels"] = 100 * figures["labels"]
    if "nll" in figures:
        row["nats"] = figures["nll"]
    if "neg_elbo" in figures:
        row["-ELBO"] = figures["neg_elbo"]
        row["nats"] = figures.get("iwae", figures["neg_elbo"])
    if "nats" in row:
        row["bits/dim"] = row["nats"] / (784 * math.log(2))
    return row


def is_current(results, script):
    """Whether a script was measured with as many samples and the same classifier as real digits."""
    return script in results and results[script]["key"][:2] == results[kind_of(script)]["key"]


def rows_of(results, scripts):
    """The lines of the table, {column: value} each: two of training images, then the scripts."""
    real = {kind: results[kind]["Frechet"] for kind in ("grey", "binarised")}
    data = [row_of(f"training images, {kind}", results[kind], real[kind]) for kind in real]
    models = [row_of(script, results[script], real[kind_of(script)]) for script in scripts]
    return data + models


def best_cells(rows):
    """The set of (model, column) that are bold."""
    best = set()
    for column, scripts in RACES:
        models = [f"{script}.py" for script in scripts]
        racers = [row for row in rows if row["model"] in models and column in row]
        if racers:
            winner = min(racers, key=lambda row: row[column])
            best.add((winner["model"], column))
    return best


def cell(row, column):
    """The text of a value, "" if there is none."""
    if column not in row:
        return ""
    text = FORMATS[column].format(row[column])
    if column == "ratio" and row[column] < 10:
        text = f"{row[column]:.1f}"
    if column in ("nats", "bits/dim") and "-ELBO" in row:  # a bound
        text = f"< {text}"
    return text


def table(rows, columns):
    """The text of the table of rows, with these columns."""
    best = best_cells(rows)
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        line = []
        for column in columns:
            text = cell(row, column)
            if (row["model"], column) in best:
                text = f"**{text}**"
            line.append(text)
        lines.append(line)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_between(path, text):
    """Replace what stands between START and END in a file."""
    content = path.read_text()
    if START not in content or END not in content:
        sys.exit(f"{path} has no lines {START.strip()} and {END.strip()}")
    before, _ = content.split(START)
    _, after = content.split(END)
    path.write_text(f"{before}{START}\n{text}\n{END}{after}")


# ---------------------------------------------------------------- pictures
def copy_pictures(assets):
    """Copy the pictures of the runs that README.md shows."""
    sources = {
        "sampling.gif": "out/transformer/sampling.gif",
        "reconstruction.png": "out/vae/reconstruction.png",
        "vqvae_reconstruction.png": "out/vqvae/reconstruction.png",
        "process.gif": "out/diffusion/process.gif",
    }
    for script in SCRIPTS:
        picture = "completion.png"
        if script in ("vae", "vqvae", "gan", "diffusion"):
            picture = "samples.png"
        sources[f"{script}.png"] = f"out/{script}/{picture}"
    for name, source in sources.items():
        if Path(source).exists():
            shutil.copyfile(source, assets / name)
    if Path("out/gan/interpolation.png").exists():
        with Image.open("out/gan/interpolation.png") as image:
            upper = image.crop((0, 0, image.width, 302))  # ten rows of twenty
            upper.save(assets / "gan_interpolation.png")


def draw_sheet(path, test_x):
    """Write ten of test_x (N, 1, 28, 28), and below them a named row of samples of each model.

    The row of a model that has no run in out/ stays as it is in the picture at path.
    """
    save_images(test_x[:10], "out/bench/data.png")
    sources = {"test images": "out/bench/data.png"}
    for script in SCRIPTS:
        sources[script] = f"out/{script}/samples.png"
    canvas = Image.new("L", (374, 30 * len(sources) + 2), 128)
    if path.exists():
        with Image.open(path) as old:
            canvas.paste(old.resize(canvas.size, Image.Resampling.NEAREST))
    for i, (name, source) in enumerate(sources.items()):
        if not Path(source).exists():
            continue
        top = 30 * i
        canvas.paste(0, (0, top + 2, 70, top + 30))
        ImageDraw.Draw(canvas).text((4, top + 10), name, fill=255)
        with Image.open(source) as grid:
            canvas.paste(grid.crop((0, 0, 302, 30)), (72, top))
    twice = canvas.resize((2 * canvas.width, 2 * canvas.height), Image.Resampling.NEAREST)
    twice.save(path)


def main():
    results = read_results()
    if not results:
        sys.exit("nothing is measured: run python bench/measure.py first")
    scripts = [script for script in SCRIPTS if is_current(results, script)]
    rows = rows_of(results, scripts)
    machines = sorted({results[script]["machine"] for script in scripts})
    n_samples = results["grey"]["key"][0]
    note = f"{n_samples:,} samples of each model; {'; '.join(machines)}.\n"
    models = rows[2:]  # without the training images
    write_between(ROOT / "README.md", f"{table(models, SHORT)}\n{note}")
    write_between(ROOT / "bench/README.md", f"{table(rows, LONG)}\n{note}")
    copy_pictures(ROOT / "assets")
    _, _, test_x, _ = load_mnist()
    draw_sheet(ROOT / "assets/samples.png", test_x)
    print(f"wrote {ROOT / 'README.md'}, {ROOT / 'bench/README.md'} and {ROOT / 'assets'}")


if __name__ == "__main__":
    main()
