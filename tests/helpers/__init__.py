"""What tests share: plain references that the fast code is held against, and small makers of inputs."""
