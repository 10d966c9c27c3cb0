"""What several loop settings make of one question, against the model without a loop.

    python examples/compare_settings.py

KL is the divergence of what a setting would say next from what the un-looped model would.
"""

import mlx_loop

SETTINGS = [
    2,  # loops
    6,
    {"loops": 4, "integrator": "euler"},
    {"loops": 4, "integrator": "naive"},  # The control: it degrades.
]

model, tokenizer = mlx_loop.load("demo")
messages = [{"role": "user", "content": "what is 12 + 30?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)

print(mlx_loop.compare(model, tokenizer, prompt, SETTINGS, max_tokens=40))
