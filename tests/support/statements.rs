//! The SQL statements of the library's source, and the plans that PostgreSQL makes for statements.

use std::path::{Path, PathBuf};

use serde_json::Value;
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Row};

/// A statement as it stands in the source.
#[derive(Debug, Clone)]
pub struct Statement {
    pub file: String,
    pub sql: String,
    /// Whether the text is put together while the program runs.
    pub formatted: bool,
}

/// Where the library's own statements are: below a folder of `core`, and a file beside what it serves.
fn wall() -> [PathBuf; 2] {
    let core = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("crates/core/src");
    [core.join("postgres"), core.join("outbox_query/sql.rs")]
}

/// All files below a folder.
fn files_below(folder: PathBuf) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder];
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let (inner, found): (Vec<PathBuf>, Vec<PathBuf>) = entries.partition(|path| path.is_dir());
        folders.extend(inner);
        files.extend(found);
    }
    files.sort();
    files
}

/// The lines of the crates' sources that run statements and stand elsewhere than where the statements are. How an event is
/// inserted is in the crate that publishers use, and what the measurements ask in theirs.
pub fn outside() -> Vec<String> {
    let mut found = Vec::new();
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    for folder in ["core", "operator", "reconciler", "relay", "testing", "worker"] {
        let files = files_below(root.join("crates").join(folder).join("src"));
        for file in files.iter().filter(|file| !wall().iter().any(|wall| file.starts_with(wall))) {
            let text = std::fs::read_to_string(file).unwrap();
            let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
            let code = text.lines().map(str::trim_start).filter(|line| !line.starts_with("//"));
            let runs = ["sqlx::query", "sqlx::raw_sql", "query(\"", "query_as(", "query_scalar("];
            let lines = code.filter(|line| runs.iter().any(|call| line.contains(call)));
            found.extend(lines.map(|line| format!("{}: {line}", file.display())));
        }
    }
    found
}

/// Every statement of ours that can be explained, outside of tests.
pub fn statements() -> Vec<Statement> {
    let [root, beside] = wall();
    let mut files = files_below(root.clone());
    files.push(beside);
    let columns = |name: &Path| {
        let text = std::fs::read_to_string(name).unwrap();
        let body = text.split_once("macro_rules! columns").map(|(_, rest)| rest.to_string());
        body.map(|body| tokens(&body).into_iter().find_map(literal).unwrap())
    };
    let shared = columns(&root.join("relay_log.rs")).unwrap();
    let mut found = Vec::new();
    for path in files {
        let file = path.file_name().unwrap().to_str().unwrap().to_string();
        let text = std::fs::read_to_string(&path).unwrap();
        let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        let columns = columns(&path).unwrap_or_else(|| shared.clone());
        // Parts of statements are not whole ones.
        let mut whole = String::new();
        let mut rest = text;
        while let Some((before, behind)) = rest.split_once("macro_rules!") {
            whole.push_str(before);
            rest = behind.split_once("\n}\n").map_or("", |(_, behind)| behind);
        }
        whole.push_str(rest);
        let mut tokens = tokens(&whole).into_iter().peekable();
        let mut formatted = false;
        while let Some(token) = tokens.next() {
            let sql = match token {
                Token::Word(word) if word == "format!(" => {
                    formatted = true;
                    continue;
                }
                Token::Word(word) if word == "concat!(" => {
                    let mut sql = String::new();
                    let (mut depth, mut known) = (1, true);
                    while depth > 0 {
                        match tokens.next() {
                            Some(Token::Text(text)) => sql.push_str(&text),
                            Some(Token::Word(word)) if word == "columns!(" => {
                                sql.push_str(&columns);
                                tokens.next();
                            }
                            // Put together from other parts, which this does not follow: it is passed over.
                            Some(Token::Word(word)) if word.ends_with("!(") => (depth, known) = (depth + 1, false),
                            Some(Token::Word(word)) if word.ends_with('(') => depth += 1,
                            Some(Token::Word(word)) if word == ")" => depth -= 1,
                            Some(_) => {}
                            None => break,
                        }
                    }
                    if !known {
                        continue;
                    }
                    sql
                }
                Token::Text(text) => text,
                Token::Word(_) => {
                    formatted = false;
                    continue;
                }
            };
            let first = sql.trim_start().split([' ', '\n']).next().unwrap_or("");
            if ["select", "insert", "update", "delete", "with", "(select"].contains(&first) && sql.trim().contains(' ')
            {
                found.push(Statement { file: file.clone(), sql, formatted });
            }
            formatted = false;
        }
    }
    found
}

enum Token {
    /// A string literal.
    Text(String),
    /// What matters of the rest: macros with their parenthesis, parentheses.
    Word(String),
}

fn literal(token: Token) -> Option<String> {
    match token {
        Token::Text(text) => Some(text),
        Token::Word(_) => None,
    }
}

/// As much of Rust as this takes.
fn tokens(text: &str) -> Vec<Token> {
    let mut found = Vec::new();
    let mut rest = text;
    let mut word = String::new();
    while let Some(c) = rest.chars().next() {
        if rest.starts_with("//") {
            rest = rest.find('\n').map_or("", |end| &rest[end..]);
        } else if let Some(behind) = rest.strip_prefix("r#\"") {
            let end = behind.find("\"#").unwrap();
            found.push(Token::Text(behind[..end].to_string()));
            rest = &behind[end + 2..];
        } else if c == '\'' {
            // A character, or a lifetime.
            let mut chars = rest.chars().skip(1);
            let (second, third) = (chars.next(), chars.next());
            let skip = match (second, third) {
                (Some('\\'), _) => rest[3..].find('\'').map_or(1, |end| end + 4),
                (Some(one), Some('\'')) => 2 + one.len_utf8(),
                _ => 1,
            };
            rest = &rest[skip..];
        } else if c == '"' {
            let (text, behind) = string(&rest[1..]);
            found.push(Token::Text(text));
            rest = behind;
        } else {
            if c.is_alphanumeric() || c == '_' || c == '!' {
                word.push(c);
            } else {
                match c {
                    '(' if word.ends_with('!') => found.push(Token::Word(format!("{word}("))),
                    '(' | ')' => found.push(Token::Word(c.to_string())),
                    _ => {}
                }
                word.clear();
            }
            rest = &rest[c.len_utf8()..];
        }
    }
    found
}

/// A string literal's text, and what comes behind it.
fn string(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &text[at + 1..]),
            '\\' => match chars.next().unwrap().1 {
                'n' => value.push('\n'),
                '\n' => {
                    let behind = chars.as_str();
                    let skipped = behind.len() - behind.trim_start().len();
                    (0..behind[..skipped].chars().count()).for_each(|_| _ = chars.next());
                }
                other => value.push(other),
            },
            c => value.push(c),
        }
    }
    panic!("a string without an end")
}

/// The plan that a statement gets when its values are not looked at, as from its sixth execution on.
pub async fn generic_plan(connection: &mut PgConnection, sql: &str) -> Result<Value, sqlx::Error> {
    let run = async |connection: &mut PgConnection, sql: String| {
        sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(connection).await
    };
    let parameters = (1..=30).rev().find(|n| sql.contains(&format!("${n}"))).unwrap_or(0);
    let (mut types, mut last) = (vec!["unknown"; parameters], None);
    loop {
        let list = if types.is_empty() { String::new() } else { format!("({})", types.join(", ")) };
        match run(connection, format!("prepare measured {list} as {sql}")).await {
            Ok(_) => break,
            Err(sqlx::Error::Database(error)) if error.message().contains("could not determine data type") => {
                let n: usize = error.message().rsplit('$').next().unwrap().trim().parse().unwrap();
                (types[n - 1], last) = ("text", Some(n - 1));
            }
            // Whoever runs it says what it is.
            Err(sqlx::Error::Database(_)) if last.is_some_and(|n| types[n] == "text") => {
                types[last.unwrap()] = "timestamptz";
            }
            Err(error) => return Err(error),
        }
    }
    let nulls = vec!["null"; parameters].join(", ");
    let values = if parameters == 0 { String::new() } else { format!("({nulls})") };
    run(connection, "set plan_cache_mode = force_generic_plan".into()).await?;
    let rows = run(connection, format!("explain (format json) execute measured {values}")).await;
    run(connection, "deallocate measured; reset plan_cache_mode".into()).await?;
    let plan: Value = rows?[0].try_get(0)?;
    Ok(plan[0]["Plan"].clone())
}

/// Every node of a plan, with whether a limit stands above it.
pub fn nodes(plan: &Value) -> Vec<(&Value, bool)> {
    fn walk<'a>(plan: &'a Value, limited: bool, found: &mut Vec<(&'a Value, bool)>) {
        found.push((plan, limited));
        // A sort reads everything, whatever the limit.
        let kind = plan["Node Type"].as_str().unwrap_or("");
        let limited = (limited || kind == "Limit") && kind != "Sort" && kind != "Aggregate";
        for child in plan["Plans"].as_array().into_iter().flatten() {
            walk(child, limited, found);
        }
    }
    let mut found = Vec::new();
    walk(plan, false, &mut found);
    found
}
