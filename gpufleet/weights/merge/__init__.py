"""Makes Vicuna from LLaMA and a delta, tensor by tensor, in little memory."""
