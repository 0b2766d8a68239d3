-- Asks a Latchkey edge about a request: http-request lua.latchkey HOST:PORT
-- Sets txn.latchkey_status (200, 401, 403, or 503 if the edge does not answer)
-- and txn.latchkey_challenge, and on 200 the identity headers of the request.

local identity = {
    "x-latchkey-key-id", "x-latchkey-org-id", "x-latchkey-key-name", "x-latchkey-environment", "x-latchkey-scopes",
    "x-latchkey-route", "x-latchkey-client-ip", "x-latchkey-deny-reason",
}

-- What does not reach the upstream: the secret, and the headers with which a
-- client could speak for the gateway.
local dropped = {
    ["authorization"] = true, ["x-api-key"] = true,
    ["x-original-method"] = true, ["x-original-uri"] = true, ["x-forwarded-method"] = true, ["x-forwarded-uri"] = true,
    ["x-forwarded-host"] = true, ["x-required-scope"] = true,
}

-- The client's headers that the edge needs to see.
local wanted = { ["authorization"] = true, ["x-api-key"] = true, ["user-agent"] = true, ["x-forwarded-for"] = true }

local function values(list)
    local out = {}
    for i = 0, #list do out[#out + 1] = list[i] end
    return out
end

core.register_action("latchkey", { "http-req" }, function(txn, edge)
    local sent, headers = txn.http:req_get_headers(), {}
    for name, list in pairs(sent) do
        if wanted[name] then headers[name] = values(list) end
    end
    local forwarded = headers["x-forwarded-for"] or {}
    forwarded[#forwarded + 1] = txn.sf:src()
    headers["x-forwarded-for"] = { table.concat(forwarded, ", ") }
    headers["x-original-method"] = { txn.sf:method() }
    headers["x-original-uri"] = { txn.sf:pathq() }
    headers["host"] = { txn.sf:req_hdr("host") }

    local answer = core.httpclient():get({ url = "http://" .. edge .. "/auth", headers = headers, timeout = 2000 })
    local status = 503
    local function value(name)
        local list = answer and answer.headers and answer.headers[name]
        return list and list[0] or ""
    end
    if answer and (answer.status == 200 or answer.status == 401 or answer.status == 403) then
        status = answer.status
        if status == 403 and value("x-latchkey-deny-reason") == "unavailable" then status = 503 end
        txn:set_var("txn.latchkey_challenge", value("www-authenticate"))
    end
    txn:set_var("txn.latchkey_status", status)

    -- Whatever the answer: no identity but the edge's, and no secret beyond here.
    -- Many applications cannot tell X_Latchkey_Key_Id from X-Latchkey-Key-Id.
    for name in pairs(sent) do
        local folded = name:lower():gsub("[^a-z0-9]", "-")
        if dropped[folded] or folded:find("^x%-latchkey%-") then txn.http:req_del_header(name) end
    end
    for _, name in ipairs(identity) do
        if status == 200 and value(name) ~= "" then txn.http:req_set_header(name, value(name)) end
    end
end, 1)
