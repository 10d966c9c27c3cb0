"""Draw how the norm of the state goes, pass by pass, in a damped loop and in a naive one.

    python examples/trace_plot.py [FILE.png]

Needs matplotlib (pip install matplotlib).
"""

import statistics
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

import mlx_loop

model, tokenizer = mlx_loop.load("demo")
messages = [{"role": "user", "content": "what is 12 + 30?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)

figure, axis = pyplot.subplots(layout="constrained")
for integrator in ("anchored", "naive"):
    view = model.with_loop({"loops": 8, "integrator": integrator})
    traced = mlx_loop.trace(view, tokenizer, prompt)
    (loop,) = traced.loops  # In layer scope there would be one for each layer of the window.
    norms = [statistics.median(one.before.norm) for one in loop.passes]
    axis.plot(range(1, len(norms) + 1), norms, marker="o", label=f"{integrator}: {loop.verdict}")
axis.axhline(1, linewidth=0.8, linestyle="--", color="grey")
axis.set(xlabel="before pass", ylabel="norm of the state / norm of the natural pass")
axis.legend()

file = sys.argv[1] if len(sys.argv) > 1 else "trace.png"
figure.savefig(file, dpi=150)
print(f"drawn in {file}")
