mod algorithms; mod common; mod llama;
