"""This model's classes, for from_pretrained(..., trust_remote_code=True)."""

try:
    from entropy_lib.modeling import EntropyGPT2Config, EntropyGPT2LMHeadModel  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("this model's classes are those of entropy_lib: install it, then load the model again") from error
