"""Training and testing a target model with Lightning."""
