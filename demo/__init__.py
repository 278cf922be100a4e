"""How the demo model of the package is made: its data, its first weights, its examination, its archive.

demo/make.sh runs these commands in their order; each can be run again alone:

    python -m demo.data build/demo-model/data.jsonl --count 300000 --seed 0
    python -m demo.fresh build/demo-model/fresh --data build/demo-model/data.jsonl --seed 0
    python -m gptoss_jax.finetune --checkpoint build/demo-model/fresh --output build/demo-model/run ...
    python -m demo.seal build/demo-model/run/checkpoint build/demo-model/sealed
    python -m demo.evaluate build/demo-model/sealed --count 200 --check
    python -m demo.pack build/demo-model/sealed

What the model learns: question.py says what a question is and which are held out; arithmetic.py, words.py, sorting.py,
functions.py, facts.py, greetings.py and unknown.py make them; instructions.py says what developers ask for;
conversations.py puts them together, with a table of weights.
"""
