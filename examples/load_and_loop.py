"""Load a model, ask it with and without loops, change the loop while it runs, save the result.

    python examples/load_and_loop.py [MODEL]

MODEL is a folder or a Hugging Face repository; without one it is the demo model that ships inside
mlx_loop.
"""

import sys
import tempfile

import mlx_loop
from mlx_loop import LoopConfig

model, tokenizer = mlx_loop.load(sys.argv[1] if len(sys.argv) > 1 else "demo")
messages = [{"role": "user", "content": "what is 12 + 30?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)

print(f"{model.model_type}, {len(model.layers)} layers. The preset: {model.loop}")
print("looped:   ", mlx_loop.generate(model, tokenizer, prompt, max_tokens=40))

# Another view on the same weights: no array is copied.
plain = model.with_loop(None)
print("un-looped:", mlx_loop.generate(plain, tokenizer, prompt, max_tokens=40))

# Fields that are left out take the model's preset.
model.loop = LoopConfig(loops=6, integrator="rk4")
print("rk4:      ", mlx_loop.generate(model, tokenizer, prompt, max_tokens=40))

# The folder remembers its settings; plain mlx-lm loads it as the un-looped model.
with tempfile.TemporaryDirectory() as folder:
    mlx_loop.save(f"{folder}/looped", model, tokenizer)
    again, _ = mlx_loop.load(f"{folder}/looped")
    print("saved and loaded again:", again.loop)
