"""The two towers, whoever's they are: `build` makes the ones that model.towers asks for.

bundle       what every kind of towers brings
contrastive  images and tokens to unit rows and the logit scale
small        the towers of the emoji run: model, tokenizer, augmentation
open_clip    open_clip's models
huggingface  transformers' CLIP and SigLIP models
timm         a timm image tower beside a transformers text tower
custom       a module of anyone's
"""
