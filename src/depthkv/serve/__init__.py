"""The embedded server: an OpenAI-compatible endpoint on one machine, for models that share (`depthkv serve`).

ragged.py decodes sequences of unlike lengths and plans together, depth.py decides who keeps how many layers,
engine.py is the loop, app.py the HTTP around it.
"""
