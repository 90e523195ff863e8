"""Repos of a Hugging Face Hub, through `huggingface_hub`: what is downloaded is checked, and what is pushed becomes
visible in one commit.

Nothing here knows a family of models.
"""
