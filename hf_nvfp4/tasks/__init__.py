"""lm-eval tasks on the embedded text. For the lm_eval command, this folder is the --include_path."""
