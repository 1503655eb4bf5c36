"""Makes transformers' Auto classes know the model: `import posttrain.model.registration` is enough."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from posttrain.model.configuration import MiniMaxText01Config
from posttrain.model.modeling import MiniMaxText01ForCausalLM, MiniMaxText01ForSequenceClassification

AutoConfig.register("minimax_text_01", MiniMaxText01Config)
AutoModelForCausalLM.register(MiniMaxText01Config, MiniMaxText01ForCausalLM)
AutoModelForSequenceClassification.register(MiniMaxText01Config, MiniMaxText01ForSequenceClassification)
