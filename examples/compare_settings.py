"""What several loop settings make of one question, against the model without a loop.

    python examples/compare_settings.py

KL is the divergence of what a setting would say next from what the un-looped model would.
"""

import mlx_loop
from mlx_loop import LoopConfig
from mlx_loop.measure.comparison import compare, distinct
from mlx_loop.method.loop import layer_passes

SETTINGS = [
    LoopConfig(loops=2),
    LoopConfig(loops=6),
    LoopConfig(loops=4, integrator="euler"),
    LoopConfig(loops=4, integrator="naive"),  # The control: it degrades.
]

model, tokenizer = mlx_loop.load("demo")
messages = [{"role": "user", "content": "what is 12 + 30?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)

# The un-looped model is the first view. All of them share their weights.
views = distinct(model, SETTINGS)
# `compare` yields after every token; what it yields last has the measures.
*_, answers = compare(views, tokenizer, prompt, max_tokens=40)

for answer in answers:
    layers = len(model.layers)
    cost = layer_passes(answer.loop, layers) / layers - 1
    print(f"{answer.loop or 'no loop'}: {cost:+.0%} layer passes")
    print(f"  {answer.text.strip()!r}")
    if answer.measures is not None:
        print(f"  KL {answer.measures.mean_kl:.3g} nats, agrees {answer.measures.agreement:.0%}")
