"""What a run lets its libraries say, and how it speaks itself: as every command that loads models."""

from trimtab.terminal import is_first_process, plain_libraries, say

__all__ = ["is_first_process", "plain_libraries", "say"]
