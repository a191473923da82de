"""What is measured: records of speed and memory, and the tables that README shows of them."""
