"""What is minimised, decided and measured, by task: pure functions of tensors."""
