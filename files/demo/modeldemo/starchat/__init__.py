"""StarChat: text chat with a gpt_bigcode model in StarChat's dialogue format."""
