"""Speed of each stage, as JSON. What is slow on one machine need not be on another: run them on yours."""
