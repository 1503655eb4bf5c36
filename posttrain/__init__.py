"""Post-training for MiniMax-Text-01 and its family: reward models, SFT, preference learning and online RL."""

__version__ = "0.1.0"
